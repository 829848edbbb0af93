"""The policy: a pipeline's own network under training, by LoRA or in full, with the base model one context away."""

from t2i_align.policy.path import PolicyError
from t2i_align.policy.policy import Policy

__all__ = ["Policy", "PolicyError"]
