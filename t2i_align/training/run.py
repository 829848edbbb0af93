"""A training run from its config: everything is made, trained, watched and written down here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from t2i_align.config import ConfigError, read_mapping
from t2i_align.devices import resolve_device
from t2i_align.errors import T2IError
from t2i_align.evaluation import check_prompts
from t2i_align.methods import read_method
from t2i_align.methods.base import OnPolicy, Tools
from t2i_align.pipelines import call_keywords, check_call, load_pipeline
from t2i_align.pipelines.catalog import check_pipeline, name_of
from t2i_align.pipelines.driver import Driver
from t2i_align.policy import Policy, PolicyError
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer, load_reward
from t2i_align.rewards.features import load_features
from t2i_align.runs import check_folder, open_folder
from t2i_align.scorer_training.blocks import ScorerRun, is_scorer_run
from t2i_align.training.blocks import FROM_PYTHON, PolicyBlock, RunConfig, load_run
from t2i_align.training.card import write_card
from t2i_align.training.checkpoints import BEST, FREE, State, checkpoints, newest_step
from t2i_align.training.checks import kernels_of
from t2i_align.training.distributed import World
from t2i_align.training.honest import Honest, Judges
from t2i_align.training.loop import fit
from t2i_align.training.prompts import Pool, make_pool, training_pool
from t2i_align.training.trackers import Trackers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LORA, MODEL = "lora", "model"  # folders of the result


class Trained(NamedTuple):
    """A finished or paused run.

    `folder`; `step`: updates made; `kept_step`: the update whose weights were kept; `kept`: their evaluation, or the
    last one before them; `note`: why it ended before its last update, kept the weights it began with, or was not
    evaluated at its end; "" for none of these. Of a scorer's training `kept` is what was measured, by scorer; nothing
    while it is paused.
    """

    folder: Path
    step: int
    kept: dict[str, Any]
    note: str = ""
    kept_step: int = 0

    @property
    def weights(self) -> Path:
        """Folder of a finished run's trained weights."""
        return next((self.folder / name for name in (LORA, MODEL) if (self.folder / name).is_dir()), self.folder / LORA)


@dataclass
class Parts:
    """All objects of a run, ready to train."""

    config: RunConfig
    pipe: DiffusionPipeline
    method: OnPolicy
    judges: Judges
    pool: Pool
    held_out: Prompts
    call: dict[str, Any]  # keywords of the pipeline for images of evaluations: as a user of the result would call it
    device: torch.device

    @property
    def trained_prompts(self) -> int:
        """How many prompts of evaluations are trained on as well."""
        trained = set(self.pool.prompts.text)
        return sum(text in trained for text in self.held_out.text)


def train(
    config: str | Path | Mapping[str, Any] | RunConfig | ScorerRun,
    *,
    pipeline: DiffusionPipeline | None = None,
    resume: bool = False,
    overwrite: bool = False,
    minutes: float | None = None,
    **overrides: Any,
) -> Trained:
    """Train a pipeline on a reward, as a config says; or a scorer, by a config with the block `scorer`.

    Args:
        config: a YAML file, a mapping of its blocks, a `RunConfig`, or a `ScorerRun`.
        pipeline: an open one, where it lies, in the place of the `model` block's; its network is trained.
        resume: go on in the run's folder from its newest checkpoint.
        overwrite: delete an earlier run in the folder.
        minutes: stop, with a checkpoint, after this much training time, that of earlier sessions included.
        overrides: changes such as `**{"train.steps": 50}` or `reward=f`: a reward, here and in a mapping, may be a
            `Scorer` or a callable. The run's `config.yaml` has its name alone, so that going on needs it again.

    Raises:
        T2IError: a config that cannot be run, with all problems in one message, before weights are loaded; or a run
            that cannot go on.
    """
    if is_scorer_run(config, list(overrides)):
        from t2i_align.scorer_training.run import refuse_pipeline, train_scorer

        refuse_pipeline(pipeline)
        done = train_scorer(config, resume=resume, overwrite=overwrite, minutes=minutes, **overrides)
        return Trained(done.folder, done.step, done.measured, kept_step=done.step)
    config, overrides, scorer = take_reward(config, overrides)
    config = read_config(config, overrides, pipeline, scorer)
    world = World.join()
    stored = config.model_copy(update={"out": None})  # a run folder may move
    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "free": {"train": FREE}}
    world.once(lambda: check_folder(config.folder, stored, **how))  # before weights are loaded
    if resume and (made := newest_step(config.folder)) > config.train.steps:
        raise ConfigError(
            f"Expected train.steps of {made} or more, the updates that {config.folder} has made, but got "
            f"{config.train.steps}: leave it out, or train in another folder."
        )
    parts = make_parts(config, world, pipeline, scorer)
    if resume and world.first and not checkpoints(config.folder):
        print(f"note: {config.folder} has no checkpoint to resume from; the run starts", file=sys.stderr)
    if parts.trained_prompts and world.first:
        print(
            f"note: {parts.trained_prompts} of the {len(parts.held_out)} evaluation prompts are trained on as well; "
            "choose another split, seed or file for evaluate.prompts to see what the run is worth on new ones",
            file=sys.stderr,
        )
    folder = world.once(lambda: open_folder(config.folder, stored, **how))
    trackers = Trackers(config, folder if world.first else None)
    watcher = Honest(
        *(config, folder, parts.held_out, parts.method, parts.judges, parts.call, trackers, world),
        trained_prompts=parts.trained_prompts,
    )
    seed, per_round = config.train.seed, config.prompts.per_round
    try:
        state = fit(
            parts.method,
            lambda number: parts.pool.draw(seed, number, per_round),
            config.train,
            folder,
            resume=resume,
            minutes=minutes,
            device=parts.device,
            world=world,
            observer=watcher,
        )
    finally:
        trackers.close()
    kept = watcher.best or watcher.rows[-1]
    world.once(lambda: write_result(parts, state, watcher, kept), state.sharded)
    world.leave_at_exit()
    step = state.step if watcher.best is None else kept["step"]
    return Trained(folder, state.step, kept, watcher.note(state.step), step)


def take_reward(config: Any, overrides: dict[str, Any]) -> tuple[Any, dict[str, Any], Scorer | None]:
    """Config and changes with its name in the place of a reward that is an object; and that object as a scorer."""
    inside = config.get("reward") if isinstance(config, Mapping) else None
    reward = overrides.get("reward", inside)
    if reward is None or isinstance(reward, (str, Path, Mapping)):
        return config, overrides, None
    if isinstance(config, Mapping):
        config = {name: block for name, block in config.items() if name != "reward"}
    scorer = load_reward(reward)
    return config, overrides | {"reward": f"{FROM_PYTHON}{scorer.name}"}, scorer


def read_config(
    config: Any,
    overrides: Mapping[str, Any],
    pipeline: DiffusionPipeline | None = None,
    scorer: Scorer | None = None,
) -> RunConfig:
    """The resolved config, checked. An open pipeline is the base, under its own name where the config has none."""
    source = config.model_dump(mode="json") if isinstance(config, RunConfig) else config
    words = [f"{name}={json.dumps(value)}" for name, value in overrides.items()]
    asked = {**(read_mapping(source).get("model") or {}), **overrides.get("model", {})}
    if pipeline is not None and "use" not in asked and "model.use" not in overrides:
        words.append(f"model.use={json.dumps(_known(pipeline))}")
    return load_run(source, words, scorer)


def _known(pipeline: DiffusionPipeline) -> str | None:
    """The name that a pipeline was loaded by, where it can be found by it."""
    name = name_of(pipeline)
    try:
        if name:
            check_pipeline(name)
    except T2IError:
        return None
    return name or None


def make_parts(
    config: RunConfig, world: World, pipeline: DiffusionPipeline | None = None, scorer: Scorer | None = None
) -> Parts:
    """Load and connect everything; scorers first, which are small and can refuse the prompts.

    Args:
        config: checked.
        world: the processes.
        pipeline: an open one in the place of that of the config.
        scorer: the reward, where the config has only its name.

    Raises:
        T2IError: what cannot serve.
    """
    if pipeline is None and config.model.use is None:
        raise ConfigError("Expected model.use to name a pipeline but got null: open one and call train(pipeline=...).")
    if pipeline is not None and not Driver(pipeline).stays:
        raise ConfigError("Expected a pipeline that stays on its device but it is offloaded: open it without offload.")
    device = resolve_device(config.model.device) if pipeline is None else pipeline.device
    if pipeline is None and device.type == "cuda" and device.index is None and world.count > 1:
        device = resolve_device(f"cuda:{world.local}")
    pool, held_out = training_pool(config), make_pool(config.evaluate.prompts).prompts
    judges = make_judges(config, device, scorer)
    check_prompts([judges.reward] if judges.reward else [], pool.prompts)
    check_prompts(list(judges.scorers.values()), held_out)
    model, e = config.model, config.evaluate
    layout = device.type == "cpu" and config.policy.use == "lora"
    options = model.options()
    if config.policy.use == "full":  # steps of the optimiser would be lost in the rounding of half precision
        options["dtype"] = "fp32"
    base = pipeline or model.use
    options |= {"device": device, "channels_last": layout}
    # A network to be dealt out stays in main memory until it is: whole, it may not fit onto the device.
    pipe = pipeline or load_pipeline(str(model.use), in_memory=config.policy.shard, **options)
    call = call_keywords(base, None, model.guidance, **model.call)
    call.pop("num_inference_steps", None)  # the method's own
    evaluation_call = call_keywords(base, e.steps, e.guidance, **model.call)
    check_call(pipe, call)
    check_call(pipe, evaluation_call)
    found, settings = read_method(config.method)
    policy = make_policy(config.policy, pipe, config.train.seed, device)
    if pipeline is None and config.policy.shard:
        move_others(pipe, policy.network, device)
    method = found(settings, policy, Tools(Driver(pipe, **call), judges.reward, call))
    for kernel in kernels_of(settings).values():  # the checks do not know a pipeline that was not on this disk
        method.tools.driver.check_kernel(kernel, settings.steps, **call)
    return Parts(config, pipe, method, judges, pool, held_out, evaluation_call, device)


def make_judges(config: RunConfig, device: torch.device, scorer: Scorer | None = None) -> Judges:
    """The trained reward (`scorer`, where the config has only its name), the watched scorers and the embedding."""
    e, trained = config.evaluate, scorer or config.reward
    reward = None if trained is None else load_reward(trained, device, base=config.model.use)
    watch = {spec: load_reward(spec, device, base=config.model.use) for spec in e.watch or ()}
    features = None if e.features is None else load_features(e.features)
    if isinstance(features, torch.nn.Module):
        features = features.to(device)
    return Judges(reward, watch, features)


def make_policy(block: PolicyBlock, pipe: DiffusionPipeline, seed: int, device: torch.device | None = None) -> Policy:
    """The trained weights in the pipeline, those in shards on a device.

    Raises:
        PolicyError: all weights of a network are to be trained, in half precision.
    """
    if block.use == "full":
        made = Policy.full(pipe, block.component, block.gradient_checkpointing, block.shard, device)
        half = sorted({str(p.dtype) for p in made.trainable() if p.dtype in (torch.float16, torch.bfloat16)})
        if half:
            raise PolicyError(
                f"Expected a {made.component} in fp32, since steps of the optimiser are lost in the rounding of "
                f"{', '.join(half)}: load it with dtype=fp32; train.precision computes in half precision all the same."
            )
        return made
    return Policy.lora(
        pipe,
        block.rank,
        block.alpha,
        block.targets,
        block.component,
        block.start,
        gradient_checkpointing=block.gradient_checkpointing,
        seed=seed,
    )


def move_others(pipe: DiffusionPipeline, network: torch.nn.Module, device: torch.device) -> None:
    """Move all networks of a pipeline but one."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and part is not network:
            part.to(device)


def write_result(parts: Parts, state: State, watcher: Honest, kept: dict[str, Any]) -> None:
    """Write the trained weights, averaged where the run averages, and the card; with `stop`, of the best evaluation."""
    folder, policy = watcher.folder, parts.method.policy
    if watcher.best is not None and watcher.best["step"] != state.step:
        state.load_weights(folder / "checkpoints" / BEST, watcher.best["step"])
    result = folder / (LORA if policy.weights.kind == "lora" else MODEL)
    with state.averaged():
        policy.save(result, holds_average=state.average is not None)
        if watcher.world.first:
            parts.method.save(folder)
    if watcher.world.first:
        write_card(result, watcher, policy, state, kept)
