"""`t2i-align bench steering`: steering methods at equal cost on the playground.

A cell is a method at a budget, steered by one reward: all prompts, all seeds. Its size (particles, candidates, rounds,
iterations) is the largest that the budget pays: a multiple of a plain sample's network calls and decode, with decodes
and backward passes at their measured price. Every cell is judged by the gold reward and by the proxy.

All methods, best-of-n too, draw with the same kernel, so that they differ by their steering alone. tiny-sd runs without
guidance, which doubles the cost of a call, in 12 steps of `ddim(1)`: gold of 128 plain samples was .79 so, .82 with its
card's guidance of 1.5, and .68 in 25 steps of its own deterministic solver, without guidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.bench.prices import Prices, measure_prices
from t2i_align.data.images import contact_sheet, tensor_to_pil
from t2i_align.errors import T2IError
from t2i_align.pipelines import Driver, call_keywords, load_pipeline
from t2i_align.pipelines.kernels import ddim
from t2i_align.playground.world import Split, sample_scenes
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer, load_reward
from t2i_align.rewards.tiny import TinyCLIP
from t2i_align.runs import environment, write_text
from t2i_align.steering import load_method
from t2i_align.steering.base import Cost, Ctx, Steered

GOLD = "verifier"
KINDS = ("pair", "group")  # two objects, counts
PROMPT_SEED, PILOT_SEED = 31_000, 32_000  # captions of the bench; of the prompts that measure rewards' spreads
BUDGETS = (8, 16)
RENO_ITERATIONS = 50  # as published
MAX_BATCH, DECODE_BATCH = 64, 32
PILOT = (16, 8)  # prompts, samples each
COLUMNS = 8  # of a picture grid
CALLS: dict[str, dict[str, Any]] = {"tiny-sd": {"steps": 12, "guidance": 1.0}, "tiny-turbo": {}}
KERNELS = {"tiny-sd": ddim(1.0)}  # a one-step pipeline has no noise but the first

Size = Callable[[float, int, Prices], dict[str, Any]]  # cost in network calls, rows, prices -> settings


@dataclass(frozen=True)
class Cell:
    """A method at a budget under a reward; `budget` None: at the published number of iterations."""

    method: str
    reward: str
    budget: int | None
    pipeline: str = "tiny-sd"
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        budget = "full" if self.budget is None else f"{self.budget:02d}x"
        return f"{self.pipeline}.{self.label or self.method}.{self.reward}.{budget}"


def cells(proxy: str) -> list[Cell]:
    """All cells of the bench."""
    made = [Cell("best_of_n", reward, 16) for reward in (GOLD, proxy)]
    for budget in reversed(BUDGETS):
        for reward in (GOLD, proxy):
            for potential in ("diff", "max", "sum"):
                made.append(Cell("fk", reward, budget, settings={"potential": potential}, label=f"fk-{potential}"))
            made += [Cell("svdd", reward, budget), Cell("noise_search", reward, budget, settings={"neighbours": 3})]
        made += [Cell("das", proxy, budget), Cell("guidance", proxy, budget)]
    made += [Cell("best_of_n", proxy, 16, "tiny-turbo")]
    return made + [Cell("reno", proxy, budget, "tiny-turbo") for budget in (*BUDGETS, None)]


def _fk(calls: float, rows: int, prices: Prices) -> dict[str, Any]:
    scored = len(load_method("fk").schedule(rows)) + 1  # type: ignore[attr-defined]
    return {"particles": int(calls / (rows + scored * prices.decode))}


def _gradient(calls: float, rows: int, prices: Prices) -> dict[str, Any]:
    step = 1 + prices.backward + prices.decode + prices.decode_backward
    return {"particles": int(calls / (rows * step + prices.decode))}


def _reno(calls: float, rows: int, prices: Prices) -> dict[str, Any]:
    iteration = rows * (1 + prices.backward) + prices.decode + prices.decode_backward
    return {"particles": 1, "iterations": int((calls - prices.decode) / iteration)}


SIZES: dict[str, Size] = {
    "best_of_n": lambda calls, rows, prices: {"particles": int(calls / prices.sample(rows) + 1e-9)},
    "fk": _fk,
    "das": _gradient,
    "guidance": _gradient,
    "reno": _reno,
    "svdd": lambda calls, rows, prices: {
        "candidates": int((calls - 1 - prices.decode) / ((rows - 1) * (1 + prices.decode)))
    },
    "noise_search": lambda calls, rows, prices: {"rounds": int((calls / prices.sample(rows) - 1) / 3)},
}


def settings_of(cell: Cell, rows: int, prices: Prices, spread: float) -> dict[str, Any]:
    """All settings of a cell's method that are not its defaults.

    Raises:
        T2IError: the budget does not pay for the smallest size.
    """
    if cell.budget is None:
        size: dict[str, Any] = {"particles": 1, "iterations": RENO_ITERATIONS}
    else:
        size = SIZES[cell.method](cell.budget * prices.sample(rows), rows, prices)
    if min(size.values()) < 1:
        raise T2IError(f"A budget of {cell.budget} plain samples is too small for {cell.method}.")
    own = {"spread": spread} if cell.method in ("fk", "das", "guidance") else {}
    return {**size, **own, **cell.settings}


def bench_prompts(
    count: int, seed: int = PROMPT_SEED, split: Split = "heldout", groups: int | None = None
) -> tuple[Prompts, list[str]]:
    """Different captions of a split, of two objects in a relation and of counts, and the kind of each.

    Args:
        count: of captions.
        seed: names them.
        split: of the playground.
        groups: how many of them are counts; half if None.
    """
    groups = count // 2 if groups is None else groups
    per_kind = dict(zip(KINDS, (count - groups, groups), strict=True))
    found: dict[str, str] = {}
    for scene in sample_scenes(100 * count, seed, split):
        kind = scene.caption.kind
        if kind == "pair" and not scene.caption.relation:  # too easy: most plain samples have both objects
            continue
        if per_kind.get(kind, 0) and str(scene.caption) not in found:
            found[str(scene.caption)] = kind
            per_kind[kind] -= 1
            if len(found) == count:
                break
    ordered = sorted(found, key=lambda text: KINDS.index(found[text]))
    return Prompts(tuple(ordered)), [found[text] for text in ordered]


@dataclass
class Bench:
    """The bench's settings and what its cells share; networks load on first use.

    `out`: folder of the results; `proxy`: the learned reward; `prompts`, `seeds`: how many.
    """

    out: Path
    proxy: str = "tiny_pick"
    prompts: int = 32
    seeds: int = 3
    loaded: dict[str, Any] = field(default_factory=dict)

    def judge(self, name: str) -> Scorer:
        """A scorer, loaded once."""
        if name not in self.loaded:
            self.loaded[name] = load_reward(name)
        return self.loaded[name]

    def context(self, pipeline: str, reward: str, seed: int = 0) -> Ctx:
        """A run of a pipeline at the bench's settings."""
        call = call_keywords(pipeline, **CALLS[pipeline])
        steps = call.pop("num_inference_steps")
        if pipeline not in self.loaded:
            self.loaded[pipeline] = Driver(load_pipeline(pipeline, channels_last=True), **call)
        driver = self.loaded[pipeline]
        scorer, kernel = self.judge(reward), KERNELS.get(pipeline)
        return Ctx(driver, scorer, steps, kernel, seed, max_batch=MAX_BATCH, decode_batch=DECODE_BATCH)

    def base(self, pipeline: str) -> dict[str, Any]:
        """Prices of a pipeline and spreads of the rewards within a prompt, measured once and kept in a file."""
        path = self.out / f"{pipeline}.base.json"
        if not path.is_file():
            prices = measure_prices(self.context(pipeline, self.proxy))
            spreads = self._spreads(pipeline)
            made = {"prices": prices._asdict(), "spreads": spreads, "environment": environment()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(made, indent=1) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))

    def _spreads(self, pipeline: str) -> dict[str, float]:
        """Root mean square over prompts, apart from the bench's, of a reward's standard deviation within a prompt."""
        prompts, _ = bench_prompts(PILOT[0], PILOT_SEED)
        ctx = self.context(pipeline, GOLD, PILOT_SEED)
        result = load_method("best_of_n", particles=PILOT[1])(ctx, prompts)
        values = {GOLD: result.totals, self.proxy: self.scores(self.proxy, result)}
        return {name: float(found.double().var(1).mean().sqrt()) for name, found in values.items()}

    def scores(self, name: str, result: Steered) -> Tensor:
        """Scores (P, K) of all particles by a scorer."""
        table = result.prompts.repeat(result.log_weight.shape[1])
        return self.judge(name).scores(result.images.flatten(0, 1), table).total.reshape(result.log_weight.shape)

    def run(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell, from its file or by running it.

        Raises:
            T2IError: the file is of a bench with other settings; a pipeline or scorer is missing.
        """
        path = self.out / cell.name / "result.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            if (len(result["rows"]), result["seeds"], result["proxy"]) != (self.prompts, self.seeds, self.proxy):
                raise T2IError(f"{path} is of a bench with other prompts, seeds or proxy: choose another --out.")
            return result
        base = self.base(cell.pipeline)
        prices, rows = Prices(**base["prices"]), self.context(cell.pipeline, cell.reward).rows
        settings = settings_of(cell, rows, prices, base["spreads"][cell.reward])
        table, kinds = bench_prompts(self.prompts)
        method, made = load_method(cell.method, **settings), []
        for seed in range(self.seeds):
            made.append(method(self.context(cell.pipeline, cell.reward, seed), table))
        result = self._summarise(cell, made, prices, rows) | {"settings": settings, "kinds": kinds}
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = contact_sheet([tensor_to_pil(image) for image in _chosen(made[0])], COLUMNS)
        grid.quantize(128).save(path.parent / "best.png", optimize=True)
        if cell.method == "best_of_n":
            plain = contact_sheet([tensor_to_pil(images[0]) for images in made[0].images], COLUMNS)
            plain.quantize(128).save(path.parent / "plain.png", optimize=True)
        write_text(path, json.dumps(result) + "\n")
        return result

    def _summarise(self, cell: Cell, made: list[Steered], prices: Prices, rows: int) -> dict[str, Any]:
        """What is kept of a cell: per prompt the scores of the returned images, their diversity, and the cost."""
        table, best = made[0].prompts, torch.stack([result.best for result in made], 1)[..., None]
        scores = {name: torch.stack([self.scores(name, result) for result in made], 1) for name in (GOLD, self.proxy)}
        kept = {name: values.gather(2, best)[..., 0] for name, values in scores.items()}
        spread = self._diversity(made)
        images = len(made) * len(table)
        cost = {name: sum(getattr(result.cost, name) for result in made) / images for name in asdict(Cost())}
        lines = []
        for at, prompt in enumerate(table.text):
            line = {"prompt": prompt, "gold": _list(kept[GOLD][at]), "proxy": _list(kept[self.proxy][at])}
            if cell.method == "best_of_n":  # every sample: the base, and best-of-n at smaller budgets
                line |= {"all_gold": _list(scores[GOLD][at]), "all_proxy": _list(scores[self.proxy][at])}
            lines.append(line | {"diversity": spread[at]})
        return {
            "cell": cell.name,
            **{name: getattr(cell, name) for name in ("method", "label", "reward", "budget", "pipeline")},
            "proxy": self.proxy,
            "seeds": len(made),
            "charge": (charge := sum(prices.charge(result.cost, rows) for result in made) / images),
            "seconds": charge * prices.sample(rows) * prices.seconds,
            "cost": cost,
            "rows": lines,
        }

    def _diversity(self, made: list[Steered]) -> list[float]:
        """Per prompt the mean cosine distance in tiny_clip's space between the images of different seeds."""
        judge = self.judge("tiny_clip")
        assert isinstance(judge, TinyCLIP)
        with torch.no_grad():
            features = torch.stack([judge.tower.image_features(_chosen(result)) for result in made])
        pairs = list(combinations(range(len(made)), 2))
        if not pairs:
            return [float("nan")] * features.shape[1]
        distances = torch.stack([1 - (features[a] * features[b]).sum(1) for a, b in pairs])
        return [round(value, 4) for value in distances.mean(0).tolist()]


def _chosen(result: Steered) -> Tensor:
    """The best image of each prompt, (P, 3, H, W)."""
    return result.images[torch.arange(len(result.images)), result.best]


def _list(values: Tensor) -> Any:
    """Nested lists of numbers with four digits after the point."""
    return [_list(value) if value.ndim else round(float(value), 4) for value in values]
