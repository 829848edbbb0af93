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
