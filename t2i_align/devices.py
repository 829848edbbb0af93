"""Where to compute."""

from __future__ import annotations

import torch

from t2i_align.errors import T2IError


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` -> the GPU if there is one, else the CPU; other names are checked.

    Raises:
        T2IError: not a device, or not one of this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise T2IError(f"Expected a device of this machine (auto, cpu, cuda, cuda:1, mps) but got {name!r}.") from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether it computes in bfloat16 by instructions of its own; CPUs without them are slower there than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False
