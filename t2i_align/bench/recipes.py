"""What each run of the training bench is set to: blocks of a training config, laid over each other in this order.

`COMMON`, then the method's, then the reward's, then the method's for that reward. Clip ranges and `eps` are those of
means over the 512 numbers of a latent: 3e-3 is 1.5 nats a step, about what 1e-4 is at 4 x 64 x 64. Networks run in bf16
where the machine has it (1.3 times as fast), which a run's result says.
"""

from __future__ import annotations

from typing import Any

from t2i_align.devices import has_bf16, resolve_device
from t2i_align.methods import read_method

GOLD = "verifier"
IMAGES = 10_240  # drawn by a run, unless the reward says otherwise

# The rewards by the names that cells have: the expression that is trained on, and the images of a run.
REWARDS: dict[str, tuple[str, int | None]] = {
    "gold": (GOLD, None),
    "pick": ("tiny_pick", None),
    "jpeg": ("jpeg_compressibility", 3_000),
    "gold-jpeg": (f"{GOLD} + 0.5 * jpeg_compressibility", 5_120),  # each counts about its own spread within a prompt
    "clip": ("tiny_clip", 5_120),
}

LOOKS = 6  # evaluations of a run after its start
MORE_LOOKS = {"clip": 24}  # where images to a given gain are read off them
PAIRS, PASSES = 2_000, 4  # of methods that learn from given pairs: how many, and how often they see each
OFFLINE = ("diffusion_dpo",)

COMMON: dict[str, Any] = {
    "model": {"use": "tiny-sd", "guidance": 1.0},
    "policy": {"use": "lora", "rank": 16},
    "method": {"steps": 8, "trained_rows": 0.5, "batch_size": 64},
    "prompts": {"kinds": ["pair", "group"], "size": 640, "per_round": 8},
    "train": {"learning_rate": 5e-4, "weight_decay": 1e-4},
    "evaluate": {"steps": 8, "guidance": 1.0, "images": 4},  # as training draws its images: a tenth of the calls
}

# What reward gradients have in common: all weights at the rate at which a run keeps what it gains.
BY_GRADIENT: dict[str, Any] = {
    "policy": {"use": "full", "rank": None},
    "prompts": {"per_round": 16},
    "train": {"learning_rate": 2e-5, "ema": 0.98},
}

# Of the value functions in docs/experiments.md the one that learns most of which image is better.
VALUE = {"net": "clip", "clip": "tiny_clip", "learning_rate": 3e-4, "weight_decay": 0.1, "memory": 64, "epochs": 1}

METHODS: dict[str, dict[str, Any]] = {
    "ddpo": {"method": {"group": 16, "epochs": 1, "minibatches": 2, "clip": 3e-3, "buffer": 32}},
    "grpo": {"method": {"group": 16, "epochs": 1, "minibatches": 2, "clip": 3e-3}},
    "d3po": {"method": {"group": 4, "epochs": 1, "minibatches": 2, "beta": 0.1}, "prompts": {"per_round": 32}},
    "prdp": {"method": {"group": 16, "epochs": 1, "minibatches": 2, "beta": 3e-5, "eps": 3e-3}},
    "vard": {
        "method": {
            "group": 4,
            "batch_size": 32,
            "minibatches": 2,
            "trained_rows": 0.99,
            "eta": 0.01,
            "warmup": 16,
            "refresh": 8,
            "value": VALUE,
        }
    }
    | BY_GRADIENT,
    "nft": {"method": {"group": 16, "minibatches": 2, "solver": "ddim"}},
    "rwr": {
        "method": {
            "group": 8,
            "minibatches": 2,
            "select": "best",
            "best": 2,
            "images": "base",
            "solver": "ddim(1.0)",
            "levels": 2,
        },
        "model": {"guidance": 1.5},  # of what is learned from: RWR alone need not draw as it trains
        "prompts": {"per_round": 16},
        "train": {"ema": 0.98},
    },
    "diffusion_dpo": {
        "method": {"group": 2, "beta": 2000.0},
        "prompts": {"per_round": 32},
        "train": {"ema": 0.98},
    },
    "refl": {"method": {"window": 0.5, "loss": "linear", "batch_size": 16}} | BY_GRADIENT,
    "draft": {"method": {"keep": 4, "batch_size": 16}} | BY_GRADIENT,
    "alignprop": {"method": {"keep": "gaussian", "batch_size": 16}} | BY_GRADIENT,
}

BY_REWARD: dict[str, dict[str, Any]] = {
    "jpeg": {"method": {"trained_rows": 0.99}, "train": {"learning_rate": 1e-3}},  # late steps decide file sizes too
    "gold-jpeg": {"method": {"trained_rows": 0.99}},
}

# For gold, the best of the tries in docs/experiments.md: many weights of cross- and self-attention at a low rate.
PLACES = ["attn2.to_v", "attn2.to_k", "attn2.to_out.0", "attn1.to_v", "attn1.to_out.0"]
SLOW: dict[str, Any] = {
    "policy": {"rank": 64, "targets": PLACES},
    "train": {"learning_rate": 3e-4, "ema": 0.98},
}
BY_STEP: dict[str, dict[str, Any]] = {  # what else policy gradients have
    "ddpo": {"method": {"gae": 0.5}},
    "grpo": {"method": {"gae": 0.5, "spread": "global"}},
}
# In 10,240 images they go too far at a constant rate with some seeds; gradients are rarely above half of this norm.
DECAY: dict[str, Any] = {"train": SLOW["train"] | {"schedule": "cosine", "max_norm": 1e-3}}
BY_BOTH: dict[tuple[str, str], dict[str, Any]] = {
    (method, reward): SLOW
    | BY_STEP.get(method, {})
    | (DECAY if method in BY_STEP and reward in ("gold", "pick") else {})
    for method in ("ddpo", "grpo", "d3po", "prdp", "nft")
    for reward in ("gold", "pick", "gold-jpeg", "clip")
}


def recipe(method: str, reward: str) -> dict[str, Any]:
    """The blocks of a run of a method on a reward of `REWARDS`."""
    known = read_method({"use": method})[1].__class__.model_fields
    common = COMMON | {"method": {name: value for name, value in COMMON["method"].items() if name in known}}
    blocks = laid_over(laid_over(common, precision()), METHODS[method])
    return laid_over(laid_over(blocks, BY_REWARD.get(reward, {})), BY_BOTH.get((method, reward), {}))


def precision() -> dict[str, dict[str, str]]:
    """The number type of a run's networks on this machine."""
    return {"train": {"precision": "bf16" if has_bf16(resolve_device()) else "fp32"}}


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Blocks with the settings of other blocks over theirs."""
    return {name: {**below.get(name, {}), **above.get(name, {})} for name in {**below, **above}}
