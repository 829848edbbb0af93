"""The config of a scorer's training: one block for each part, all of it checked before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from t2i_align.config import ConfigError, Settings, TrainConfig, load_config, read_mapping
from t2i_align.errors import T2IError
from t2i_align.runs import home_of

COMPARING = ("bradley_terry", "plackett_luce")  # objectives that compare the images of a prompt
OUTPUTS = {"regression": "regression", "hl_gauss": "hl_gauss", "quantile": "quantile"}  # of heads, by objective


class ScorerBlock(Settings):
    """The scorer: whose CLIP it starts from, what is trained of it, and its head."""

    use: str = Field("tiny_clip", description="a scorer on one CLIP, or the folder of a trained one")
    options: dict[str, Any] = Field(default_factory=dict, description="of that scorer, such as name: a hub id of clip")
    name: str = Field("trained", pattern=r"^[a-z0-9_.]+$", description="of the result, in sums and tables")
    train: Literal["full", "lora", "head"] = Field(
        "full", description="the whole CLIP, a LoRA on it, or the head alone"
    )
    head: Literal["cosine", "weighted", "linear", "mlp"] = Field("cosine", description="see rewards/heads.py")
    reads: Literal["product", "image", "both"] = Field("product", description="what a linear or mlp head looks at")
    hidden: tuple[int, ...] = Field((256,), min_length=1, description="widths of an mlp head")
    scale: float | None = Field(None, gt=0, description="exp(logit_scale) at the start; null: the CLIP's own")
    rank: int = Field(16, gt=0, description="of the LoRA")
    alpha: float | None = Field(None, gt=0, description="the LoRA's update is alpha / rank B A; null: the rank")
    targets: tuple[str, ...] | None = Field(
        None,
        description="endings of layer names for the LoRA; null: linear layers of attention, or else all linear ones",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one")


class DataBlock(Settings):
    """Images with preferences or scores."""

    use: Literal["file", "scenes", "playground"] = Field(
        "file", description="a file or folder; drawn scenes ranked by the verifier; tiny-sd's pictures ranked by it"
    )
    path: str | None = Field(None, description="what read_preferences takes: pairs, rankings, or single scored images")
    columns: dict[str, str] | None = Field(None, description="which column is which; null: find out")
    root: str | None = Field(None, description="folder of the images; null: that of the file")
    limit: int | None = Field(None, gt=0, description="rankings that are taken, the first ones")
    prompts: int = Field(128, gt=1, description="of scenes and playground")
    split: Literal["train", "heldout"] = Field("train", description="of scenes and playground")
    seed: int = Field(0, description="of scenes and playground")
    samples: str | None = Field(None, description="of playground: run folder that keeps tiny-sd's pictures; null: out")

    @model_validator(mode="after")
    def _fits(self) -> DataBlock:
        if (self.use == "file") != (self.path is not None):
            raise T2IError("Expected use: file with path: PATH, or use: scenes or playground without.")
        if self.use != "file" and (self.columns, self.root) != (None, None):
            raise T2IError("Expected columns and root beside use: file alone: leave them out.")
        return self


class TrainingData(DataBlock):
    """What is trained on, and how it goes through the network."""

    batch: int = Field(32, gt=0, description="rankings of an update; pairs and scored images are rankings, too")
    micro_batch: int | None = Field(None, gt=0, description="rankings that are backpropagated together; null: all")
    noise: float = Field(0.0, ge=0, description="largest standard deviation of noise on a picture in [0, 1]")
    label_noise: float = Field(0.0, ge=0, lt=0.5, description="share of the pairs that are turned round")


class ObjectiveBlock(Settings):
    """What is learnt."""

    use: Literal["bradley_terry", "plackett_luce", "regression", "hl_gauss", "quantile"] = "bradley_terry"
    ties: Literal["half", "rao_kupper", "drop"] = Field("half", description="of bradley_terry, see losses.py")


class EnsembleBlock(Settings):
    """Several members from one start, and what is made of them."""

    members: int = Field(1, gt=0)
    bootstrap: bool = Field(True, description="each learns from its own sample of the prompts, with replacement")
    learning_rates: tuple[float, ...] | None = Field(None, description="one for each member")
    combine: Literal["mean", "warm"] = Field(
        "mean", description="an ensemble, with a std; or one scorer with the mean of the weights (WARM)"
    )

    @model_validator(mode="after")
    def _fits(self) -> EnsembleBlock:
        rates = self.learning_rates
        if rates is not None and len(rates) != self.members:
            raise T2IError(f"Expected learning_rates for the {self.members} members but got {len(rates)}.")
        if self.combine == "warm" and self.members == 1:
            raise T2IError("Expected 2 or more members with combine: warm.")
        return self


class HeldOutBlock(Settings):
    """What a run is measured on, as it goes."""

    every: int = Field(50, gt=0, description="updates between evaluations")
    data: DataBlock | None = Field(None, description="held-out data; null: a share of the prompts of the training data")
    share: float = Field(0.1, gt=0, lt=1, description="of the prompts, where no data are named")
    keep: Literal["last", "best"] = Field(
        "last", description="weights of the result: the last, or the best evaluation's"
    )
    batch_size: int = Field(64, gt=0, description="images that are scored together")


class ScorerRun(Settings):
    """A scorer's training."""

    out: str | None = Field(None, description="run folder; null: runs/NAME")
    scorer: ScorerBlock = ScorerBlock()
    data: TrainingData
    objective: ObjectiveBlock = ObjectiveBlock()
    ensemble: EnsembleBlock = EnsembleBlock()
    train: TrainConfig
    evaluate: HeldOutBlock = HeldOutBlock()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.scorer.name}")

    @property
    def comparing(self) -> bool:
        """Whether it learns from comparisons, not from scores."""
        return self.objective.use in COMPARING

    def member(self, number: int) -> TrainConfig:
        """The loop's settings of a member: its own order of the data, and learning rate."""
        rates = self.ensemble.learning_rates
        rate = self.train.learning_rate if rates is None else rates[number]
        return self.train.model_copy(update={"seed": self.train.seed + number, "learning_rate": rate})


def is_scorer_run(source: Any, overrides: Sequence[str] = ()) -> bool:
    """Whether a config has the block `scorer`, which makes it one of this kind.

    Raises:
        ConfigError: a file that cannot be read.
    """
    if isinstance(source, Settings):
        return isinstance(source, ScorerRun)
    return "scorer" in read_mapping(source) or any(word.startswith("scorer.") for word in overrides)


def load_scorer_run(source: Any, overrides: Sequence[str] = ()) -> ScorerRun:
    """The config of a scorer's training from a YAML file or a mapping, with `a.b=value` words over it.

    The `config.yaml` of a run means that run: `out` is its folder, unless it is given.

    Raises:
        ConfigError: everything that is wrong with it, found without loading any weight.
    """
    given = source.model_dump(mode="json") if isinstance(source, ScorerRun) else source
    config = load_config(ScorerRun, given, overrides)
    if config.out is None:
        config = config.model_copy(update={"out": home_of(source)})
    found = list(problems(config))
    if found:
        origin = f" in {source}" if isinstance(source, (str, Path)) else ""
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError(f"The config{origin} has {count}: " + "; ".join(text.rstrip(".") for text in found) + ".")
    return config


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides of a Python call as the words of a command line."""
    return [f"{name}={json.dumps(value)}" for name, value in overrides.items()]


def problems(config: ScorerRun) -> Iterator[str]:
    """One sentence for everything that would stop a run, none that fits."""
    import os

    from t2i_align.devices import resolve_device
    from t2i_align.runs import folder_problems

    yield from _parts(config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        yield f"expected one process, since scorers are trained in one, but got {os.environ['WORLD_SIZE']}"
    try:
        resolve_device(config.scorer.device)
    except T2IError as error:
        yield str(error)
    try:
        _check_base(config.scorer)
    except T2IError as error:
        yield f"scorer.use: {error}"
    yield from folder_problems(config.folder)
    yield from _data(config)


def _parts(config: ScorerRun) -> Iterator[str]:
    """Settings that do not go together."""
    scorer, objective, data = config.scorer, config.objective.use, config.data
    if not config.comparing and scorer.head in ("cosine", "weighted"):
        yield f"scorer.head: expected linear or mlp with objective.use: {objective} but got {scorer.head}"
    if scorer.train == "head" and scorer.head == "cosine":
        yield "scorer.head: expected weighted, linear or mlp with scorer.train: head, since a cosine has no weights"
    if scorer.train == "head" and data.noise:
        yield "data.noise: expected none with scorer.train: head, which encodes each picture once"
    if data.label_noise and objective != "bradley_terry":
        yield f"data.label_noise: expected none with objective.use: {objective}, since it turns pairs round"


def _check_base(scorer: ScorerBlock) -> None:
    """Raise T2IError where the base is unknown, is not on one CLIP, or lacks its weights."""
    from t2i_align.rewards.build import check_node
    from t2i_align.rewards.expression import Part
    from t2i_align.rewards.trained import base_class

    check_node(Part("base", scorer.use, scorer.options) if scorer.options else scorer.use, base_class)


def _data(config: ScorerRun) -> Iterator[str]:
    """What can be told of data in files without opening an image."""
    from t2i_align.scorer_training.data import read, refuse, split

    try:
        if config.data.use == "file":
            examples = read(config.data)
            train, held_out = split(examples, config)
            yield from refuse(train, config, "data")
            if config.evaluate.data is None:
                yield from refuse(held_out, config, "evaluate.share, the held-out part of the data")
        if config.evaluate.data is not None and config.evaluate.data.use == "file":
            yield from refuse(read(config.evaluate.data), config, "evaluate.data")
    except T2IError as error:
        yield str(error)
