"""Training methods: one paper a file, on one rollout and one loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from t2i_align.config import ConfigError, find_class, load_config
from t2i_align.errors import T2IError

if TYPE_CHECKING:
    from t2i_align.methods.base import OnPolicy, SamplingSettings

METHODS = {
    "ddpo": "t2i_align.methods.ddpo:DDPO",
    "grpo": "t2i_align.methods.grpo:GRPO",
    "d3po": "t2i_align.methods.d3po:D3PO",
    "prdp": "t2i_align.methods.prdp:PRDP",
    "vard": "t2i_align.methods.vard:VARD",
    "refl": "t2i_align.methods.refl:ReFL",
    "draft": "t2i_align.methods.draft:DRaFT",
    "alignprop": "t2i_align.methods.draft:AlignProp",
    "diffusion_dpo": "t2i_align.methods.diffusion_dpo:DiffusionDPO",
    "nft": "t2i_align.methods.nft:NFT",
    "rwr": "t2i_align.methods.rwr:RWR",
}


def method_class(name: str) -> type[OnPolicy]:
    """The class behind a name of the table, or behind `package.module:Class`.

    Raises:
        T2IError: no such method; the message has the nearest name and the list.
    """
    return find_class(name, METHODS, "method", "t2i_align.methods.base:OnPolicy")


def read_method(block: Mapping[str, Any]) -> tuple[type[OnPolicy], SamplingSettings]:
    """The class and the settings of a block `{use: grpo, group: 16, ...}`.

    Raises:
        T2IError: an unknown method or settings that it has not.
    """
    if not isinstance(block.get("use"), str):
        raise T2IError(f"use is required. Available: {', '.join(METHODS)}.")
    use, given = block["use"], {name: value for name, value in block.items() if name != "use"}
    kind = settings_class(use)
    try:
        return method_class(use), load_config(kind, given)
    except ConfigError as error:
        strange = set(given) - set(kind.model_fields)
        if not strange or not any(strange <= set(settings_class(name).model_fields) for name in METHODS):
            raise
        fresh = f"method='{{use: {use}}}' starts from {use}'s own settings"
        raise ConfigError(f"{error} Another method has {', '.join(sorted(strange))}: {fresh}.") from error


def settings_class(name: str) -> type[SamplingSettings]:
    """The settings of a method. Raises T2IError where there is no such method."""
    kind: type[SamplingSettings] = get_type_hints(method_class(name))["settings"]
    return kind
