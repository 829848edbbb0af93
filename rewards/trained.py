"""Scorers that `t2i-align train` made (`scorer:` configs): folders with `scorer.json`, opened by `load_reward(FOLDER)`.

A folder holds a head (`head.safetensors`) on a CLIP, which is one of

    the base's own       only the head was trained; the base is named in `scorer.json`
    the base's + LoRA    `adapter.safetensors`, merged when opened: W + (alpha / rank) B A
    its own              a whole CLIP in the format of its library, which opens it without this package, too

or it holds members, folders of the same kind: their mean, with a std by disagreement (`rewards/ensemble.py`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.clip import TowerScorer
from t2i_align.rewards.ensemble import Mean, average_weights
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import load_strictly
from t2i_align.rewards.heads import Cosine, Head, make_head
from t2i_align.rewards.tower import TOWERS, Preprocessing, Tower, TowerSpec

FACTS, HEAD, ADAPTER = "scorer.json", "head.safetensors", "adapter.safetensors"
RUN = "scorer"  # the folder of a run that has it
UNITS = {"preferences": "log-odds", "scores": "that of its data"}


class Trained(TowerScorer):
    """A head on a CLIP, as `t2i-align train` left it; the options are in its folder."""

    differentiable = True
    license: ClassVar[str] = "that of its base and data"
    folder: ClassVar[Path]
    facts: ClassVar[Mapping[str, Any]]

    def __init__(self) -> None:
        Scorer.__init__(self)
        self._hold(open_tower(self.folder, self.facts))
        self.head: Head = make_head(self.facts["head"])
        load_strictly(self.head, _read(self.folder / HEAD), self.folder / HEAD)

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        return _missing(cls.facts)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.head.float()  # features are fp32 whatever the tower's number type
        return self

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor | tuple[Tensor, Tensor]:
        text = self.tower.text_features(prompts.text) if self.needs_prompt else None
        return self.head(self.tower.image_features(images), text)


class TrainedEnsemble(Mean):
    """The mean of trained scorers and, as std, their disagreement (with ddof 1, as of a sample) and own doubts."""

    license: ClassVar[str] = Trained.license
    folder: ClassVar[Path]
    facts: ClassVar[Mapping[str, Any]]
    name = ""

    def __init__(self, ddof: int = 1) -> None:
        name = type(self).name
        super().__init__(*(open_class(folder)() for folder in members_of(self.folder, self.facts)), ddof=ddof)
        self.name = name

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        found = (open_class(folder).missing() for folder in members_of(cls.folder, cls.facts))
        return next((said for said in found if said), None)


def find_folder(name: str | Path) -> Path | None:
    """The folder of a trained scorer that a name means, that of a run's `scorer/` included; None where it is none."""
    for folder in (Path(name), Path(name) / RUN):
        if (folder / FACTS).is_file():
            return folder
    return None


def open_class(folder: Path) -> type[Scorer]:
    """The scorer class of a folder: its constructor needs no arguments.

    Raises:
        RewardError: a `scorer.json` that cannot be read.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        base: type[Scorer] = TrainedEnsemble if "members" in facts else Trained
        prompts = facts["needs_prompt"]
        said = {"name": facts["name"], "unit": facts["unit"], "summary": facts["summary"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardError(f"Cannot read {folder / FACTS}: {' '.join(str(error).split())}.") from error
    place = {"folder": folder, "facts": facts, "needs_prompt": prompts, "source": str(folder)}
    made = type(base.__name__, (base,), {"__doc__": base.__doc__, "__module__": base.__module__, **said, **place})
    made.__qualname__ = f"{base.__name__}[{folder.resolve()}]"  # equal folders are one scorer in a reward
    return made


def members_of(folder: Path, facts: Mapping[str, Any]) -> list[Path]:
    """The folders of an ensemble's members."""
    return [folder / name for name in facts["members"]]


def base_class(use: str) -> type[TowerScorer]:
    """The scorer on one CLIP that a name or folder means.

    Raises:
        RewardError: unknown, or not on one CLIP.
    """
    from t2i_align.rewards import scorer_class

    found = scorer_class(use)
    if not issubclass(found, TowerScorer):
        raise RewardError(
            f"Expected a scorer on one CLIP, such as tiny_clip, clip, pickscore or hpsv2.1, but got {use!r}."
        )
    return found


def open_tower(folder: Path, facts: Mapping[str, Any]) -> Tower:
    """The CLIP of a trained scorer, shared like any.

    Raises:
        RewardError: weights that are missing or cannot be read.
    """
    from t2i_align.rewards.checkpoints import load_tower

    if facts["base"] is None:
        spec = dict(facts["tower"])
        how: list[Any] = [tuple(v) if isinstance(v, list) else v for v in spec.pop("preprocessing") or ()]
        given = Preprocessing(*how) if how else None
        place = folder.resolve()
        spec["name"] = f"local-dir:{place}" if spec["name"] == "local-dir:" else str(place)
        return load_tower(TowerSpec(**spec, preprocessing=given))
    use, options = facts["base"]["use"], facts["base"]["options"]
    tower = base_class(use)(**options).tower
    return adapted(tower, folder / ADAPTER) if facts["adapter"] else tower


def adapted(tower: Tower, adapter: Path) -> Tower:
    """A tower with a LoRA merged into a copy of its weights, shared like any."""
    key = (tower.spec._replace(adapter=f"{tower.spec.adapter} {adapter.resolve()}".strip()), tower.device, tower.dtype)
    found = TOWERS.get(key)
    if found is None:
        network = copy.deepcopy(tower.network)
        merge_adapter(network, _read(adapter), adapter)
        encoders = tower.encode_image, tower.encode_text, tower.tokenise, tower.length
        found = TOWERS[key] = Tower(key[0], network, tower.preprocessing, *encoders)
    return found


@torch.no_grad()
def merge_adapter(network: nn.Module, adapter: Mapping[str, Tensor], path: Path) -> None:
    """Add (alpha / rank) B A to the weight of every layer of a LoRA, linear or convolution.

    Raises:
        RewardError: a layer that the network does not have, or of another shape.
    """
    for name in (key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")):
        try:
            a, b = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
            weight = network.get_parameter(f"{name}.weight")
            change = (float(adapter[f"{name}.alpha"]) / len(a)) * (b.flatten(1).float() @ a.flatten(1).float())
            weight.add_(change.view_as(weight).to(weight))
        except (AttributeError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise RewardError(f"The LoRA {path} is not one of this CLIP: its layer {name!r} ({said}).") from error


def write_scorer(
    folder: Path,
    name: str,
    tower: Tower,
    head: Head,
    *,
    base: Mapping[str, Any],
    learns: str,
    network: nn.Module | None = None,
    adapter: Mapping[str, Tensor] | None = None,
    summary: str = "",
) -> None:
    """Write a folder that `load_reward` opens.

    Args:
        folder: made, if need be.
        name: of the scorer.
        tower: what the head is on; with `network` its preprocessing and tokenizer.
        head: fp32.
        base: `use` and `options` of the scorer whose CLIP it is.
        learns: `preferences` or `scores`.
        network: a trained CLIP in the place of the base's.
        adapter: `<layer>.lora_A.weight`, `<layer>.lora_B.weight` and `<layer>.alpha` of a LoRA on the base's CLIP.
        summary: what it is, if more than trained from its base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = None if network is None else write_network(folder, tower, network, head)
    if adapter is not None:
        save_file({key: value.detach().cpu().contiguous() for key, value in adapter.items()}, folder / ADAPTER)
    save_file({key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}, folder / HEAD)
    facts = {
        "name": name,
        "unit": UNITS[learns],
        "summary": summary or f"trained on {learns} from {base['use']}",
        "needs_prompt": head.reads_prompt,
        "learns": learns,
        "head": head.facts,
        "base": None if spec else dict(base),
        "adapter": adapter is not None,
        "tower": spec,
    }
    _write(folder, facts)


def write_ensemble(folder: Path, name: str, members: Sequence[str]) -> None:
    """Make a folder of trained scorers the ensemble of those named, which lie in it."""
    first = json.loads((folder / members[0] / FACTS).read_text(encoding="utf-8"))
    kept = {key: first[key] for key in ("unit", "needs_prompt", "learns")}
    summary = f"{len(members)} members {first['summary']}"
    _write(folder, {"name": name, **kept, "summary": summary, "members": list(members)})


def write_network(folder: Path, tower: Tower, network: nn.Module, head: Head) -> dict[str, Any]:
    """Write a CLIP in its library's format; returns how its tower is opened, but for where it lies."""
    if isinstance(head, Cosine) and head.weight is None:
        with torch.no_grad():  # so that others who open it find the scale, too
            network.get_parameter("logit_scale").fill_(head.log_scale)
    given = tower.spec.preprocessing
    kept = {"processor": tower.spec.processor, "preprocessing": None if given is None else list(given)}
    if hasattr(network, "save_pretrained") and hasattr(network, "config"):
        from transformers import AutoTokenizer, CLIPImageProcessor

        from t2i_align.rewards.checkpoints import CLIP_WORDS

        own: Any = network
        own.save_pretrained(folder)
        source = tower.spec.processor or tower.spec.name
        if source == CLIP_WORDS:
            return {"name": "", **kept}
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
        if given is None:
            CLIPImageProcessor.from_pretrained(source, local_files_only=True).save_pretrained(folder)
        return {"name": "", **kept, "processor": ""}
    from open_clip.factory import get_model_config
    from open_clip.tokenizer import HFTokenizer

    from t2i_align.rewards.checkpoints import needs_quick_gelu

    model: Any = network
    config = get_model_config(tower.spec.name) or {}
    config["quick_gelu"] = needs_quick_gelu(tower.spec) or config.get("quick_gelu", False)
    how = {key: value for key, value in model.visual.preprocess_cfg.items() if key not in ("size", "mode")}
    _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": how})
    if isinstance(tower.tokenise, HFTokenizer):
        tower.tokenise.tokenizer.save_pretrained(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})
    return {"name": "local-dir:", **kept}


def average_scorers(folders: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> None:
    """Write the scorer whose weights are the mean of those of trained scorers (WARM, arXiv 2401.12187).

    One forward pass in the place of several, for scorers that were fine-tuned from one start. LoRA is merged first:
    the mean of products is not the product of means.

    Args:
        folders: of scorers with one kind of head and one architecture.
        out: where it is written.
        weights: their shares, which sum to 1; equal if None.

    Raises:
        RewardError: scorers that cannot be averaged.
    """
    classes = [open_class(folder) for folder in folders]
    if len(classes) < 2 or not all(issubclass(found, Trained) for found in classes):
        raise RewardError("Expected 2 or more folders of single trained scorers to average, and no ensemble.")
    made: list[Trained] = [found() for found in classes]  # type: ignore[misc]
    first, facts = made[0], [dict(scorer.facts) for scorer in made]
    for name in ("head", "learns"):
        if any(other[name] != facts[0][name] for other in facts):
            raise RewardError(f"Expected scorers with the same {name} to average but got {[f[name] for f in facts]}.")
    head: Any = average_weights([scorer.head for scorer in made], weights)
    head.facts = first.head.facts
    alike = all(scorer.tower is first.tower for scorer in made) and first.facts["base"] is not None
    network = None if alike else average_weights([scorer.tower.network for scorer in made], weights)
    options: dict[str, Any] = {"base": first.facts["base"] or {}, "learns": facts[0]["learns"], "network": network}
    said = f"mean of the weights of {len(made)} scorers, the first {first.facts['summary']}"
    write_scorer(out, first.name, first.tower, head, summary=said, **options)


def _missing(facts: Mapping[str, Any]) -> str | None:
    base = facts.get("base")
    if base is None:
        return None
    try:
        return base_class(base["use"]).missing(**base["options"])
    except RewardError as error:
        return f"its base is not there: {error}"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # of a damaged file: safetensors' own errors, and the system's
        raise RewardError(f"Cannot read the weights {path}: {' '.join(str(error).split())}.") from error


def _write(folder: Path, facts: Mapping[str, Any]) -> None:
    _write_json(folder / FACTS, facts)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
