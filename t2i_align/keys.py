"""Keyed randomness: every random number is a function of named parts, never of the order of calls.

`generator(seed, "noise", sample, step)` gives the same stream on every machine, in every process and after every
resume, whatever was drawn before it.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Part = int | str


def key(*parts: Part) -> int:
    """Hash `parts` (ints and strings, order matters) to a seed in [0, 2**63)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: Part) -> torch.Generator:
    """A CPU `torch.Generator` seeded by `key(*parts)`; draw on the CPU and move, so that devices agree."""
    import torch

    return torch.Generator().manual_seed(key(*parts))
