"""What can be wrong with a run and be told from its config, before any weight is loaded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from t2i_align.errors import T2IError
from t2i_align.methods import METHODS, method_class, read_method
from t2i_align.methods.base import SamplingSettings
from t2i_align.methods.forward import NATIVE
from t2i_align.methods.policy_gradient import PolicyGradientSettings
from t2i_align.pipelines.kernels import Kernel, load_kernel
from t2i_align.rewards import Scorer, WeightedSum, check_reward, scorer_class
from t2i_align.rewards.expression import Call, Node, Part, Sum
from t2i_align.rewards.gradients import differentiable, without_gradient
from t2i_align.runs import folder_problems
from t2i_align.training.blocks import FROM_PYTHON, TRAINED, PromptsBlock, RunConfig, Source, from_python, on_playground
from t2i_align.training.distributed import World
from t2i_align.training.prompts import make_pool, training_pool


def problems(config: RunConfig, world: World | None = None, scorer: Scorer | None = None) -> list[str]:
    """One sentence for everything that would stop a run, none that fits; `scorer`: a reward passed as an object."""
    world = world or World(count=int(os.environ.get("WORLD_SIZE", 1)))
    if from_python(config.reward) and scorer is None:
        name = str(config.reward).removeprefix(FROM_PYTHON)
        return [
            f"reward: expected {name}, an object that no config holds, to be passed again, from Python: "
            "t2i.train(config, reward=..., resume=True)"
        ]
    checks: list[Callable[[RunConfig], Iterator[str]]]
    checks = [_model, _sources, partial(_prompts, scorer=scorer), _choices, partial(_pareto, scorer=scorer)]
    checks += [_stop, _folder, _libraries]
    found: list[str] = []
    for check in checks:
        try:
            found += check(config)
        except T2IError as error:
            found.append(str(error))
    return found + list(_sizes(config, world))


def _model(config: RunConfig) -> Iterator[str]:
    from t2i_align.devices import resolve_device
    from t2i_align.pipelines.catalog import check_pipeline

    resolve_device(config.model.device)
    use = config.model.use
    download = None if use is None else check_pipeline(use, config.model.revision)
    if config.policy.start is not None and not Path(config.policy.start).exists():
        yield f"policy.start: no such file or folder: {config.policy.start}"
    if config.policy.use == "full" and config.model.dtype not in (None, "fp32"):
        yield (
            f"model.dtype: expected fp32 with policy.use: full, whose updates are lost in the rounding of "
            f"{config.model.dtype}; train.precision=bf16 computes in half precision all the same"
        )
    if use is not None and download is None and config.policy.use == "lora" and config.policy.targets is not None:
        _find_targets(use, config)


def _find_targets(use: str, config: RunConfig) -> None:
    """Raise PolicyError where a LoRA target fits no layer, from the network's config alone."""
    import diffusers
    import torch

    from t2i_align.pipelines.catalog import find_pipeline
    from t2i_align.pipelines.weights import read_index
    from t2i_align.policy.component import DENOISERS
    from t2i_align.policy.lora import find_targets

    folder = find_pipeline(use, config.model.revision)
    index = read_index(folder)
    component = config.policy.component or next((name for name in DENOISERS if name in index), DENOISERS[0])
    library, name = index.get(component, (None, None))
    kind: Any = getattr(diffusers, name, None) if library == "diffusers" else None
    if kind is None:  # a class of its own, or another library's: found out when it is opened
        return
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(folder, subfolder=component))
    find_targets(network, config.policy.targets)


def _kernels(config: RunConfig, settings: SamplingSettings) -> Iterator[str]:
    """Kernels for flow matching, where the pipeline is on this disk and of another kind."""
    from t2i_align.pipelines.catalog import find_pipeline, is_flow

    if config.model.use is None:
        return
    try:
        flow = is_flow(find_pipeline(config.model.use, config.model.revision))
    except T2IError:  # it has to be downloaded, or `_model` says what is wrong
        return
    for name, kernel in kernels_of(settings).items():
        if kernel.linear_only and flow is False:
            yield (
                f"method.{name}: {kernel.name} is for flow-matching schedulers, which that of {config.model.use} is "
                "not; use ddim(eta) or cps(level)"
            )


def kernels_of(settings: SamplingSettings) -> dict[str, Kernel]:
    """The kernels that a method's settings name, by setting."""
    named = {name: getattr(settings, name, None) for name in ("kernel", "solver")}
    return {name: load_kernel(spec) for name, spec in named.items() if spec not in (None, NATIVE)}


def _sources(config: RunConfig) -> Iterator[str]:
    """Prompts that are not named; those of the playground suit its pipelines alone, where they are filled in."""
    blocks: dict[str, tuple[Source, ...]] = {"evaluate.prompts": (config.evaluate.prompts,)}
    if config.choices is None:
        blocks = {"prompts": config.prompts.mix or (config.prompts,)} | blocks
    try:
        if on_playground(config.model.use):
            return
    except T2IError:  # `_model` says what is wrong with it
        return
    what = config.model.use or "an open pipeline without a name"
    for name, sources in blocks.items():
        if any(source.use is None for source in sources):
            yield (
                f"{name}: expected a file of prompts ({name}.use=file {name}.path=FILE) since {what} is no pipeline of "
                f"the playground, whose captions {name}.use=playground would take"
            )


def _prompts(config: RunConfig, scorer: Scorer | None) -> Iterator[str]:
    pools = {"prompts": training_pool(config), "evaluate.prompts": make_pool(config.evaluate.prompts)}
    scorers: list[Scorer | type[Scorer]] = [] if scorer is None else [scorer]
    if config.reward is not None and scorer is None:
        scorers += leaf_classes(check_reward(config.reward))
    for name, pool in pools.items():
        watch = config.evaluate.watch or () if name == "evaluate.prompts" else ()
        needed = [*scorers, *(kind for spec in watch for kind in leaf_classes(check_reward(spec)))]
        for kind in dict.fromkeys(needed):
            absent = [column for column in kind.columns if column not in pool.prompts.columns]
            if absent:
                yield f"{name}: the scorer {kind.name} reads the columns {', '.join(absent)}, which are missing"
    yield from _method(config, pools["prompts"].prompts.columns, scorer)


def _method(config: RunConfig, columns: Collection[str], scorer: Scorer | None) -> Iterator[str]:
    """What a method needs of the reward and of the prompts."""
    found, settings = read_method(config.method)
    blind = without_gradient(scorer or config.reward) if found.needs_gradient else []
    if blind:
        own = "" if scorer is None else ", FunctionScorer(f, differentiable=True) if gradients pass through it"
        yield (
            f"reward: expected a differentiable one for {config.method['use']} but {', '.join(blind)} "
            f"{'is' if len(blind) == 1 else 'are'} not: use {', '.join(differentiable())}{own}, or another method"
        )
    solver = getattr(settings, "solver", NATIVE)
    if solver != NATIVE:
        load_kernel(solver)
    if settings.kernel is not None and not load_kernel(settings.kernel).stochastic and not found.needs_gradient:
        yield (
            f"method.kernel: expected a stochastic kernel such as ddim(1.0) but got {settings.kernel}, whose steps "
            "have no log-prob"
        )
    yield from _kernels(config, settings)
    said = found.refuse(settings, columns)
    if said is not None:
        yield said


def leaf_classes(node: Node) -> Iterator[type[Scorer]]:
    """The classes of the scorers that a reward is made of."""
    if isinstance(node, str):
        yield scorer_class(node)
        return
    if isinstance(node, Call):
        inner: tuple[Node, ...] = () if node.function in ("vendi", "fid", "cmmd") else node.members
    elif isinstance(node, Part):
        inner = (node.use,)
    elif isinstance(node, Sum):
        inner = tuple(member for _, member in node.terms)
    else:
        inner = (node.objective, *(limit.node for limit in node.limits))
    for member in inner:
        yield from leaf_classes(member)


def _choices(config: RunConfig) -> Iterator[str]:
    """What of the run is not as it was when the images of a person's choices were drawn."""
    if config.choices is None:
        return
    from t2i_align.choices import read_job
    from t2i_align.pipelines import call_keywords

    job, model, folder = read_job(config.choices), config.model, config.choices
    given = config.prompts.model_copy(update={"use": None}) if config.prompts.path is None else config.prompts
    if given != PromptsBlock(per_round=config.prompts.per_round):
        yield f"prompts: expected per_round alone, since the prompts are those of {folder}"
    if model.use is None:  # an open pipeline, which nothing is known of
        return
    here = call_keywords(model.use, job.steps, model.guidance, **model.call)
    ours = {"model.use": _place(model.use), "model.vae": model.vae, "model.quantize": model.quantize} | here
    theirs = {"model.use": _place(job.pipeline), "model.vae": job.vae, "model.quantize": job.quantize} | job.call()
    if model.dtype is not None:
        ours, theirs = ours | {"model.dtype": model.dtype}, theirs | {"model.dtype": job.dtype}
    for name in dict.fromkeys([*theirs, *ours]):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: {folder} was drawn with {theirs.get(name)}, but here it is {ours.get(name)}"
    drawn = [(_place(path), weight) for path, weight in job.lora]
    base = [(_place(path), weight) for path, weight in model.lora]
    start = config.policy.start
    if drawn != base and (start is None or drawn != [*base, (_place(start), 1.0)]):
        last = job.lora[-1][0] if job.lora else "none"
        yield (
            f"policy.start: expected {last}, the LoRA that {folder} was drawn with, to go on from it; or model.lora "
            "with it, to train a new one on top"
        )


def _pareto(config: RunConfig, scorer: Scorer | None) -> Iterator[str]:
    """What needs several rewards and has one, and a language model that cannot be had."""
    _, s = read_method(config.method)
    several = {"select": "pareto", "combine": "gdpo"}
    asked = [f"method.{name}: {value}" for name, value in several.items() if getattr(s, name, None) == value]
    if asked and config.reward is not None:
        if scorer is not None:
            terms = len(scorer.factors) if isinstance(scorer, WeightedSum) else 1
        else:
            node = check_reward(config.reward)
            terms = len(node.terms) if isinstance(node, Sum) else 1
        if terms < 2:
            yield f"reward: expected a sum of two rewards or more, such as 'a + b', with {' and '.join(asked)}"
    if isinstance(s, PolicyGradientSettings) and s.expand is not None:
        from transformers import AutoConfig

        if config.policy.shard:
            yield "method.expand: expected none with policy.shard, which is for the pipeline's network alone"
        try:
            AutoConfig.from_pretrained(s.expand.use)
        except (OSError, ValueError) as error:
            yield f"method.expand.use: no language model {s.expand.use} ({' '.join(str(error).split()):.120})"


def _place(name: str) -> str:
    """A path in full; a name that is none as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _stop(config: RunConfig) -> Iterator[str]:
    stop, watch = config.evaluate.stop, config.evaluate.watch
    known = (*((TRAINED,) if config.reward is not None else ()), *(watch or ()))
    if stop is not None and watch is not None and stop.watch not in known:
        yield f"evaluate.stop.watch: expected one of {', '.join(known) or 'evaluate.watch'} but got {stop.watch!r}"


def _folder(config: RunConfig) -> Iterator[str]:
    yield from folder_problems(config.folder)


def _libraries(config: RunConfig) -> Iterator[str]:
    wanted = {"wandb": config.log.wandb, "bitsandbytes": config.train.optimizer == "adamw_8bit"}
    extra = {"wandb": ("log.wandb", "wandb"), "bitsandbytes": ("train.optimizer", "bnb")}
    for library, asked in wanted.items():
        if asked and importlib.util.find_spec(library) is None:
            key, name = extra[library]
            yield f"{key}: {library} is not installed; `pip install 't2i-align[{name}]'`, or leave it out"


def _shards(config: RunConfig, count: int, batches: int) -> Iterator[str]:
    """What weights in shards need: several processes with equally much to do, and number types that they have."""
    method, s = read_method(config.method)
    if not method.shardable:
        able = ", ".join(name for name in METHODS if method_class(name).shardable)
        yield f"policy.shard: expected one of {able}, with equal updates in all processes, but got {method.__name__}"
    if config.train.elastic_reset:
        yield "train.elastic_reset: expected none with policy.shard"
    if count == 1:
        yield "policy.shard: expected several processes, as by `torchrun --nproc_per_node 2`, but there is one"
    elif batches % s.minibatches:
        yield f"method.minibatches: expected to divide the {batches} batches of a process but got {s.minibatches}"
    if config.train.precision == "fp16":
        yield "train.precision: expected bf16 or fp32 with policy.shard but got fp16"
    if config.train.optimizer != "adamw":
        yield f"train.optimizer: expected adamw with policy.shard but got {config.train.optimizer}"


def _sizes(config: RunConfig, world: World) -> Iterator[str]:
    """Rounds, groups, batches, minibatches and processes that do not fit together."""
    method, s = read_method(config.method)
    count, per_round, size = world.count, config.prompts.per_round, method.dealt(s)
    if count > 1 and config.model.device.startswith("cuda:"):
        named = config.model.device
        yield f"model.device: expected cuda, of which each of {count} processes takes its own, but got {named}"
    if per_round % count:
        yield f"prompts.per_round: expected a multiple of the {count} processes but got {per_round}"
        return
    images = per_round // count * s.group
    if config.policy.shard:
        yield from _shards(config, count, images // size)
    if s.batch_size % s.group and s.group % s.batch_size:
        yield f"method.batch_size: {s.batch_size} neither divides nor is a multiple of the group of {s.group} images"
    if images % s.batch_size:
        each = "" if count == 1 else f" in each of {count} processes"
        yield (
            f"method.batch_size: expected to divide the {images} images of a round{each} (prompts.per_round "
            f"{per_round} x group {s.group}) but got {s.batch_size}"
        )
    elif images // size * count % s.minibatches:
        of = "" if size == s.batch_size else f" of whole groups, {size} images each,"
        yield (
            f"method.minibatches: expected to divide the {images // size * count} batches{of} of a round but got "
            f"{s.minibatches}"
        )
    updates = s.epochs * s.minibatches
    if config.train.steps % updates:
        yield f"train.steps: expected a multiple of the {updates} updates of a round but got {config.train.steps}"
