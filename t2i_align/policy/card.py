"""The model card beside a policy's weights: what they are, and code that opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = """\
---
{header}
---
# {title}

{text}

```python
{code}
```

To train it further: `Policy.load(pipe, "path/to/this/folder")` of t2i-align; `policy.json` is for it.
"""

STOCK = """\
{imports}

pipe = {pipeline}.from_pretrained("{base}", dtype={dtype})
pipe.load_lora_weights(".")  # this folder"""

PEFT = """\
{imports}
from peft import PeftModel

pipe = {pipeline}.from_pretrained("{base}", dtype={dtype})
PeftModel.from_pretrained(pipe.{component}, ".")  # this folder; changes the pipeline's own {component}"""

FULL = """\
{imports}

pipe = {pipeline}.from_pretrained(".", dtype={dtype})  # this folder"""


def card(pipeline: type, note: Mapping[str, Any], portable: bool) -> str:
    """The README.md of a saved policy.

    Args:
        pipeline: class of the pipeline.
        note: content of `policy.json`.
        portable: whether the pipeline's own `load_lora_weights` opens the weights.
    """
    lora, base = note["kind"] == "lora", note["base"] or "the/base/model"
    header = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if note["base"] and not Path(base).exists():  # a name on the hub
        header["base_model"] = base
    tags = ["text-to-image", "t2i-align", *(["lora"] if lora else [])]
    lines = [f"{name}: {value}" for name, value in header.items()] + ["tags:", *(f"- {tag}" for tag in tags)]
    code = (STOCK if portable else PEFT) if lora else FULL
    module = "diffusers" if pipeline.__module__.startswith("diffusers.") else pipeline.__module__
    return CARD.format(
        header="\n".join(lines),
        title=f"{'LoRA of the' if lora else 'Fine-tuned'} {note['component']} of {base}",
        text=_text(note, portable),
        code=code.format(
            imports=f"import torch\nfrom {module} import {pipeline.__name__}",
            pipeline=pipeline.__name__,
            base=Path(base).resolve() if Path(base).exists() else base,  # the code is run in this folder
            dtype=note["dtype"],
            component=note["component"],
        ),
    )


def _text(note: Mapping[str, Any], portable: bool) -> str:
    averaged = " Weights are averaged over the training (EMA)." if note["averaged"] else ""
    if note["kind"] == "full":
        return f"All weights of the {note['network']} are trained; the rest of the pipeline is the base's.{averaged}"
    named = portable and note["component"] == "unet"
    kohya = " `kohya.safetensors` is the same for ComfyUI and A1111." if named else ""
    scale = " The factor alpha / rank is multiplied into the weights: load them at scale 1." if portable else ""
    return (
        f"Rank {note['rank']}, alpha {note['alpha']:g}, on {len(note['targets'])} layers of the {note['network']}."
        f"{scale}{kohya}{averaged}"
    )
