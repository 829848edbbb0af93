"""What attention in fp32 saves an update in bf16 on a CPU: medians of alternating pairs in one run.

    python benchmarks/training.py [PAIRS]

Forward and backward passes under autocast, with `WideAttention` and without: tiny-sd at batch 64 with a LoRA, as the
training bench has it, and attention alone, eight heads of 40 channels. From 512 tokens on it changes nothing.
"""

import json
import sys
import time
from statistics import median

import torch
from torch.nn import functional as F

from t2i_align.config import TrainConfig
from t2i_align.devices import has_bf16
from t2i_align.pipelines import load_pipeline
from t2i_align.policy import Policy
from t2i_align.training.precision import autocast

PAIRS = int(sys.argv[1]) if len(sys.argv) > 1 else 7
CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=1, precision="bf16")


def network():
    """An update's pass of tiny-sd."""
    pipe = load_pipeline("tiny-sd", channels_last=True)
    Policy.lora(pipe, rank=16)
    x = torch.randn(64, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    prompts = torch.randn(64, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    return lambda: pipe.unet(x, 500, encoder_hidden_states=prompts).sample


def attention(batch, tokens, keys):
    """A layer's pass."""
    q, k, v = (torch.randn(batch, 8, size, 40, dtype=torch.bfloat16).requires_grad_() for size in (tokens, keys, keys))
    return lambda: F.scaled_dot_product_attention(q, k, v)


def seconds(forward, context):
    started = time.perf_counter()
    with context:
        forward().float().square().mean().backward()
    return time.perf_counter() - started


def main():
    torch.manual_seed(0)
    if not has_bf16(CPU):
        print("This CPU has no bf16 instructions: runs are in fp32 here, and the numbers below say little.")
    cases = {"tiny-sd": network()}
    for batch, q, k in [(64, 64, 77), (8, 256, 256), (2, 1024, 1024)]:
        cases[f"{batch} x {q} x {k} tokens"] = attention(batch, q, k)
    for name, forward in cases.items():
        plain, wide = [], []
        for _ in range(PAIRS + 1):  # the first pair warms up
            plain.append(seconds(forward, torch.autocast("cpu", torch.bfloat16, cache_enabled=False)))
            wide.append(seconds(forward, autocast(CPU, CONFIG)))
        ratio = median(after / before for before, after in zip(plain[1:], wide[1:], strict=True))
        found = {"bf16": median(plain[1:]), "attention in fp32": median(wide[1:]), "ratio": ratio}
        print(name, json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
