"""Training methods: one paper a file, on one rollout and one loop."""

METHODS = {
    "ddpo": "t2i_align.methods.ddpo:DDPO",
    "grpo": "t2i_align.methods.grpo:GRPO",
    "d3po": "t2i_align.methods.d3po:D3PO",
    "prdp": "t2i_align.methods.prdp:PRDP",
}
