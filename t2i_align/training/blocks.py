"""The config of a training run: one block for each part, all of it checked before any weight is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from t2i_align.config import ConfigError, Settings, TrainConfig, load_config
from t2i_align.errors import T2IError
from t2i_align.methods import read_method
from t2i_align.playground.grammar import KINDS, Kind
from t2i_align.rewards import check_reward, scorer_class
from t2i_align.rewards.gradients import scorer_names
from t2i_align.runs import home_of

if TYPE_CHECKING:
    from t2i_align.rewards import Scorer

GOLD = "verifier"  # watched on the playground
TRAINED = "reward"  # the trained reward's name among those of an evaluation
FROM_PYTHON = "from Python: "  # before the name of a reward that was passed as an object, which no config holds


class ModelBlock(Settings):
    """The base pipeline: options of `load_pipeline`, and how training images are drawn."""

    use: str | None = Field(
        "tiny-sd", description="alias, hub id or folder of a pipeline; null: an open one without a name, from Python"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of the frozen weights; null: what suits, fp32 where all weights are trained"
    )
    variant: str | None = Field(None, description="of the weight files")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    vae: str | None = Field(None, description="folder or hub id of another autoencoder")
    lora: tuple[tuple[str, float], ...] = Field((), description="LoRA and weights that belong to the base")
    quantize: Literal["4bit"] | None = Field(None, description="4-bit base weights, on a GPU")
    attention: str | None = Field(None, description="back-end of attention")
    guidance: float | None = Field(None, description="guidance scale of training images; null: the pipeline's own")
    call: dict[str, Any] = Field(default_factory=dict, description="other keywords of the pipeline's __call__")

    def options(self) -> dict[str, Any]:
        """Keywords of `load_pipeline`."""
        names = ("dtype", "variant", "revision", "vae", "quantize", "attention")
        return {name: getattr(self, name) for name in names} | {"lora": list(self.lora)}


class PolicyBlock(Settings):
    """What is trained of it."""

    use: Literal["lora", "full"] = Field("lora", description="a LoRA, or all weights of the network")
    rank: int | None = Field(None, gt=0, description="of the LoRA; null: 16")
    alpha: float | None = Field(None, gt=0, description="the update is alpha / rank B A; null: the rank")
    targets: tuple[str, ...] | None = Field(
        None, description="endings of layer names; null: linear layers of attention"
    )
    component: str | None = Field(None, description="which network of the pipeline; null: its denoiser")
    start: str | None = Field(None, description="LoRA to go on from, with its own rank, alpha and layers")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    shard: bool = Field(False, description="deal all weights out over the processes (FSDP2); with use: full")

    @model_validator(mode="after")
    def _fits(self) -> PolicyBlock:
        given = [name for name in ("rank", "alpha", "targets", "start") if getattr(self, name) is not None]
        if self.use == "full" and given:
            unset = " ".join(f"policy.{name}=null" for name in given)
            raise T2IError(f"Expected no {', '.join(given)} where all weights are trained: leave them out, or {unset}.")
        if self.use == "lora" and self.shard:
            raise T2IError("Expected use: full with shard, since a LoRA is small enough to be whole in every process.")
        if self.start is not None and len(given) > 1:
            unset = " ".join(f"policy.{name}=null" for name in given if name != "start")
            raise T2IError(f"Expected rank, alpha and targets from start but they were given too: {unset}.")
        return self


class Source(Settings):
    """Where prompts come from."""

    use: Literal["playground", "file", "pairs"] | None = Field(
        None,
        description="captions of the playground, a file, or images with preferences; null: the playground for its "
        "own pipelines",
    )
    path: str | None = Field(
        None,
        description="a file that `read_prompts` takes, such as .txt; of preferences what `read_preferences` takes",
    )
    columns: dict[str, str] | None = Field(None, description="of preferences: which column is which; null: find out")
    root: str | None = Field(None, description="of preferences: folder of the images; null: that of the file")
    split: Literal["train", "heldout"] = Field("train", description="of the playground")
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1, description="of the playground's captions")
    size: int = Field(512, gt=0, description="different captions of the playground")
    seed: int = Field(0, description="names the playground's captions")
    weight: float = Field(1.0, gt=0, description="share of a part of a mixture")

    @model_validator(mode="after")
    def _fits(self) -> Source:
        if (self.use not in (None, "playground")) != (self.path is not None):
            raise T2IError("Expected use: file with path: FILE, or use: pairs with path: PATH, or neither.")
        if self.use != "pairs" and (self.columns, self.root) != (None, None):
            raise T2IError("Expected columns and root beside use: pairs alone: leave them out.")
        return self


class PromptsBlock(Source):
    """Prompts of training."""

    per_round: int = Field(8, gt=0, description="prompts of a round, `group` images each")
    mix: tuple[Source, ...] = Field((), description="several sources by weight, in the place of one")


class StopBlock(Settings):
    """When to stop, and which weights to keep."""

    watch: str = Field(description="a scorer of `watch`, or `reward`")
    patience: int = Field(3, gt=0, description="evaluations without a new best one")


class BudgetBlock(Settings):
    """How far the policy may drift from the base; the weights kept are those of an evaluation within it."""

    kl: float | None = Field(None, gt=0, description="nats per image")
    chi2: float | None = Field(None, gt=0, description="sum over steps of the mean exp(2 KL) - 1")


class EvaluateBlock(Settings):
    """What a run is measured on, as it goes."""

    every: int = Field(50, gt=0, description="updates between evaluations")
    prompts: Source = Field(Source(split="heldout", size=32), description="fixed prompts, not those of training")
    images: int = Field(2, gt=0, description="images per prompt")
    steps: int | None = Field(None, gt=0, description="denoising steps; null: the pipeline's own")
    guidance: float | None = Field(None, description="guidance scale; null: the pipeline's own")
    seed: int = Field(0, description="of the images")
    batch_size: int = Field(16, gt=0, description="images that are drawn together")
    watch: tuple[str, ...] | None = Field(
        None,
        description="scorers that are not trained on; null: for pipelines of the playground the verifier, unless the "
        "reward has it",
    )
    features: str | None = Field(
        None, description="embedding of the diversity measures; null: tiny_clip for pipelines of the playground"
    )
    kl_images: int = Field(16, gt=0, description="images on which the KL to the base is estimated")
    stop: StopBlock | None = Field(None, description="stop early, and keep the best weights")
    budget: BudgetBlock = Field(BudgetBlock(), description="end the run at the first evaluation that is further away")

    @field_validator("watch")
    @classmethod
    def _known(cls, watch: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for spec in watch or ():
            check_reward(spec)
        return watch


class LogBlock(Settings):
    """What is written besides `metrics.jsonl`."""

    tensorboard: bool = Field(True, description="write event files for TensorBoard")
    wandb: str | None = Field(None, description="project of Weights & Biases")
    pictures: int = Field(8, gt=0, description="prompts whose pictures are kept, beside the base's")


class RunConfig(Settings):
    """A training run."""

    out: str | None = Field(None, description="run folder; null: runs/METHOD")
    model: ModelBlock = ModelBlock()
    policy: PolicyBlock = PolicyBlock()
    method: dict[str, Any] = Field(description="use: a method; its settings beside that")
    prompts: PromptsBlock = PromptsBlock()
    reward: str | dict[str, Any] | None = Field(
        None, description="what is maximised: an expression or a mapping of scorers; null with a person's choices"
    )
    train: TrainConfig
    evaluate: EvaluateBlock = EvaluateBlock()
    log: LogBlock = LogBlock()

    @field_validator("method")
    @classmethod
    def _complete(cls, block: dict[str, Any]) -> dict[str, Any]:
        try:
            _, settings = read_method(block)
        except ConfigError as error:
            raise T2IError(str(error).partition(": ")[2]) from error
        return {"use": block["use"], **settings.model_dump(mode="json")}

    @field_validator("reward")
    @classmethod
    def _exists(cls, reward: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if reward is not None and not from_python(reward):
            check_reward(reward)
        return reward

    @model_validator(mode="after")
    def _learns(self) -> RunConfig:
        if (self.reward is None) == (self.choices is None):
            raise T2IError("Expected a reward, or method.choices with a person's choices in its place, and not both.")
        return self

    @property
    def choices(self) -> str | None:
        """The folder of a person's choices, in a run that learns from them."""
        return self.method.get("choices")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.method['use'].rpartition(':')[2].lower()}")


def leaves(reward: str | dict[str, Any] | None, scorer: Scorer | None = None) -> set[type[Scorer]]:
    """The classes of the scorers that a reward is made of; `scorer`: the reward, where it was passed as an object."""
    if scorer is not None:
        return set(map(type, scorer.leaves()))
    return (
        set() if reward is None or from_python(reward) else set(map(scorer_class, scorer_names(check_reward(reward))))
    )


def from_python(reward: Any) -> bool:
    """Whether a config names a reward that was passed as an object."""
    return isinstance(reward, str) and reward.startswith(FROM_PYTHON)


def load_run(source: Any, overrides: tuple[str, ...] | list[str] = (), scorer: Scorer | None = None) -> RunConfig:
    """The config of a run from a YAML file or a mapping, with `a.b=value` words over it.

    The `config.yaml` of a run means that run: `out` is its folder, unless it is given.

    Args:
        source: a file or a mapping.
        overrides: what is changed.
        scorer: the reward, where it is passed as an object; the config then has its name, after `FROM_PYTHON`.

    Raises:
        ConfigError: everything that is wrong with it, found without loading any weight; see `checks.problems`.
    """
    from t2i_align.training.checks import problems

    given = load_config(RunConfig, source, overrides)
    config = _filled_in(given, scorer)
    if config.out is None:
        config = config.model_copy(update={"out": home_of(source)})
    found = problems(config, scorer=scorer)
    if found:
        origin = f" in {source}" if isinstance(source, (str, Path)) else ""
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError(f"The config{origin} has {count}: " + "; ".join(text.rstrip(".") for text in found) + ".")
    if given.evaluate.watch is None and not config.evaluate.watch and os.environ.get("RANK", "0") == "0":
        what = "scorer" if config.reward is None else "scorer but the trained reward"
        print(
            f"note: no {what} is watched: set evaluate.watch to some that are not trained on (`t2i-align rewards` has "
            "them), and evaluate.features, for diversity, to an embedding such as clip",
            file=sys.stderr,
        )
    return config


def on_playground(pipeline: str | None) -> bool:
    """Whether a pipeline was made for captions of the playground. Raises T2IError for one that is unknown."""
    from t2i_align.pipelines.catalog import card_of

    return pipeline is not None and card_of(pipeline).get("prompts") == "playground"


def _filled_in(config: RunConfig, scorer: Scorer | None) -> RunConfig:
    """The config with what suits a pipeline of the playground, where nothing else is said."""
    try:
        playground = on_playground(config.model.use)
    except T2IError:  # the checks say what is wrong with it
        return config
    given = config.evaluate
    asked = given.stop is not None and given.stop.watch == GOLD
    watch = (GOLD,) if playground and (asked or not leaves(GOLD) & leaves(config.reward, scorer)) else ()
    features = "tiny_clip" if playground and scorer_class("tiny_clip").missing() is None else None
    changes = {"watch": watch if given.watch is None else given.watch, "features": given.features or features}
    config = config.model_copy(update={"evaluate": given.model_copy(update=changes)})
    return _with_captions(config) if playground else config


def _with_captions(config: RunConfig) -> RunConfig:
    """The config of a run on a pipeline of the playground, whose captions serve where no prompts are named."""
    named, e = {"use": "playground"}, config.evaluate
    if config.prompts.use is None and config.choices is None and not config.prompts.mix:
        config = config.model_copy(update={"prompts": config.prompts.model_copy(update=named)})
    if e.prompts.use is None:
        e = e.model_copy(update={"prompts": e.prompts.model_copy(update=named)})
    return config.model_copy(update={"evaluate": e})
