"""The training bench's table, curves and pages, from the cells' results alone.

Gains are paired: the cell's pictures less the base's, on the same prompts and noise, the images of a prompt averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pvariance, stdev
from typing import Any, NamedTuple

from PIL import Image
from scipy.stats import t as student

from t2i_align.bench.efficiency import need_findings, need_rows
from t2i_align.bench.pages import Picture, Shown, fill_in
from t2i_align.bench.recipes import OFFLINE, REWARDS
from t2i_align.bench.steering_report import Estimate, estimate
from t2i_align.bench.training import EACH, SAMPLERS, WORST
from t2i_align.report import write_report

BEGIN, END = "<!-- training bench: begin -->", "<!-- training bench: end -->"
COMPRESSED = 0.6  # base standard deviations that file sizes should fall by
HOW = {"own": "as a user draws images", "short": "as training does"}  # by sampler
GAIN, WITHIN = 0.10, 60.0  # gold that one method should gain on train-split prompts, within so many minutes

Result = dict[str, Any]


class Line(NamedTuple):
    """A row of the table: the runs of a method on a reward, one per seed."""

    label: str
    reward: str
    runs: list[Result]

    def gains(self, base: Result, name: str, split: str = "train", sampler: str = "own") -> list[list[float]]:
        """By seed, the gain of every prompt."""
        before = base["scores"][sampler][split][name]
        return [_less(run["scores"][sampler][split][name], before) for run in self.runs]

    def gain(self, base: Result, name: str, split: str = "train", sampler: str = "own") -> Estimate:
        """With its interval over prompts, seeds averaged."""
        return estimate([fmean(values) for values in zip(*self.gains(base, name, split, sampler), strict=True)])

    def judged(self, name: str) -> bool:
        """Whether all runs were judged by a scorer; those of earlier versions were by fewer."""
        return all(name in run["scores"]["own"]["train"] for run in self.runs)

    def mean(self, name: str) -> float:
        """Of a number of the runs."""
        return fmean(run[name] for run in self.runs)


def table_lines(results: Sequence[Result]) -> list[Line]:
    """The runs by reward and method."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: list(REWARDS).index(result["reward"])):
        found.setdefault((result["reward"], result["variant"] or result["method"]), []).append(result)
    return [Line(label, reward, runs) for (reward, label), runs in found.items()]


def over_seeds(gains: Sequence[Sequence[float]]) -> Estimate:
    """The mean gain with its interval over seeds (Student's t), prompts averaged; NaN for one seed."""
    means = [fmean(values) for values in gains]
    if len(means) < 2:
        return Estimate(means[0], math.nan)
    return Estimate(fmean(means), float(student.ppf(0.975, len(means) - 1)) * stdev(means) / math.sqrt(len(means)))


def table_rows(lines: Sequence[Line], base: Result) -> list[dict[str, str]]:
    """The cells of the table by column; the base first, with its means."""
    own = base["scores"]["own"]
    first = {"reward": "-", "method": "base", "seeds": "", "images": "", "minutes": ""}
    first |= {"gold, train": _mean(own["train"]["gold"]), "over seeds": ""}
    first |= {"gold, held-out": _mean(own["heldout"]["gold"])}
    first |= {"gold, short": _mean(base["scores"]["short"]["train"]["gold"])}
    first |= {"proxy": _mean(own["train"]["pick"]), "tiny_clip": _mean(own["train"]["clip"])}
    first |= {"kB": f"{-fmean(own['train']['jpeg']):.3f}"}
    first |= {"diversity": _mean(own["train"]["diversity"]), "hypervolume": _mean(own["train"]["hypervolume"])}
    return [first | {"KL": "0"}, *(_row(line, base) for line in lines)]


def _row(line: Line, base: Result) -> dict[str, str]:
    kilobytes = line.gain(base, "jpeg")
    seeds = over_seeds(line.gains(base, "gold"))
    return {
        "reward": line.reward,
        "method": line.label,
        "seeds": str(len(line.runs)),
        "images": f"{line.mean('images'):.0f}",
        "minutes": f"{line.mean('seconds') / 60:.0f}",
        "gold, train": signed(line.gain(base, "gold")),
        "over seeds": "" if math.isnan(seeds.half) else f"± {seeds.half:.3f}",
        "gold, held-out": signed(line.gain(base, "gold", "heldout")),
        "gold, short": signed(line.gain(base, "gold", sampler="short")),
        "proxy": signed(line.gain(base, "pick")),
        "tiny_clip": signed(line.gain(base, "clip")) if line.judged("clip") else "",
        "kB": signed(Estimate(-kilobytes.mean, kilobytes.half)),
        "diversity": signed(line.gain(base, "diversity")),
        "hypervolume": signed(line.gain(base, "hypervolume")),
        "KL": f"{line.mean('kl'):.3g}",
    }


def signed(value: Estimate) -> str:
    """A gain as text."""
    return f"{value.mean:+.3f}" + ("" if math.isnan(value.half) else f" ± {value.half:.3f}")


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}"


def _less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, others, strict=True)]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table."""
    head = f"| {' | '.join(rows[0])} |\n" + "|---" * len(rows[0]) + "|"
    return "\n".join([head, *(f"| {' | '.join(row.values())} |" for row in rows)])


def findings(lines: Sequence[Line], base: Result) -> list[str]:
    """The floors of the bench and whether they were reached; what else was asked."""
    said = list(_compressed(lines, base)) + list(_gold(lines, base))
    for line in lines:
        if line.reward == "pick":
            said += [_proxy(line, base, sampler) for sampler in HOW]
    return said + list(_pareto(lines, base)) + list(_pairs(lines, base)) + list(need_findings(lines))


def _proxy(line: Line, base: Result, sampler: str) -> str:
    proxy, gold = (line.gain(base, name, sampler=sampler) for name in ("pick", "gold"))
    verdict = "gold rises too" if gold.sure and gold.mean > 0 else "gold does not measurably rise"
    verdict = "gold falls: the proxy is hacked" if gold.sure and gold.mean < 0 else verdict
    return f"{line.label} on the proxy, {HOW[sampler]}: proxy {signed(proxy)}, gold {signed(gold)}: {verdict}."


def base_spread(base: Result) -> float:
    """Standard deviation of the base's file sizes, kB, over all of its images of train-split prompts."""
    own = base["scores"]["own"]["train"]
    within = fmean(value**2 for value in own["spread"]) * (EACH - 1) / EACH
    return math.sqrt(pvariance(own["jpeg"]) + within)


def _compressed(lines: Sequence[Line], base: Result) -> Iterator[str]:
    spread = base_spread(base)
    for line in lines:
        if line.reward == "jpeg":
            gain = line.gain(base, "jpeg")
            verdict = "reached" if gain.mean >= COMPRESSED * spread else "not reached"
            yield (
                f"{line.label} on file size, {line.mean('images'):.0f} images: {gain.mean / spread:.2f} ± "
                f"{gain.half / spread:.2f} base standard deviations ({spread:.2f} kB) smaller; the floor of "
                f"{COMPRESSED} is {verdict}; gold {signed(line.gain(base, 'gold'))}."
            )


def _gold(lines: Sequence[Line], base: Result) -> Iterator[str]:
    mine = [line for line in lines if line.reward == "gold"]
    for line in mine:
        own, short = (line.gain(base, "gold", sampler=sampler) for sampler in HOW)
        held_out = line.gain(base, "gold", "heldout")
        falls = "falls" if held_out.sure and held_out.mean < 0 else "does not measurably fall"
        yield (
            f"{line.label} on gold: train-split gold {signed(own)} ({_above(own)}), as training draws its images "
            f"{signed(short)} ({_above(short)}); held-out gold {signed(held_out)} ({falls})."
        )
    for sampler, how in HOW.items() if mine else ():
        found = [(line.gain(base, "gold", sampler=sampler), line) for line in mine]
        gain, best = max(found, key=lambda pair: pair[0].mean)
        minutes = best.mean("seconds") / 60
        reached = gain.mean >= GAIN and minutes <= WITHIN
        yield (
            f"The largest gain {how} is {best.label}'s, {signed(gain)} in {minutes:.0f} minutes of training: the floor "
            f"of {GAIN:.2f} within {WITHIN:.0f} minutes is {'reached' if reached else 'not reached'}."
        )


def _above(gain: Estimate) -> str:
    return "above 0" if gain.sure and gain.mean > 0 else "not above 0"


def _pareto(lines: Sequence[Line], base: Result) -> Iterator[str]:
    both = {line.label: line for line in lines if line.reward == "gold-jpeg"}
    if {"grpo", "grpo-pareto"} <= set(both):
        values = [both[label].gains(base, "hypervolume") for label in ("grpo-pareto", "grpo")]
        means = [[fmean(seeds) for seeds in zip(*value, strict=True)] for value in values]
        difference = estimate(_less(*means))
        verdict = "larger" if difference.mean > 0 else "smaller"
        verdict = verdict if difference.sure else "not distinguishable"
        yield (
            f"Pareto selection against the weighted sum: hypervolume {signed(difference)} ({verdict}), measured per "
            f"prompt from gold {WORST[0]:g} and {-WORST[1]:g} kB."
        )


def _pairs(lines: Sequence[Line], base: Result) -> Iterator[str]:
    for line in lines:
        for sampler, how in HOW.items() if line.label in OFFLINE else ():
            gain = line.gain(base, "gold", sampler=sampler)
            yield (
                f"{line.label} on {line.mean('pairs'):.0f} given pairs, {how}: gold {signed(gain)}; a gain above 0 is "
                f"{'reached' if gain.sure and gain.mean > 0 else 'not reached'}."
            )


def tuning_rows(results: Sequence[Result], base: Result) -> list[dict[str, str]]:
    """What was tried with other settings."""
    rows = []
    for result in results:
        line = Line(result["cell"], result["reward"], [result])
        row = {"run": result["cell"], "settings": ", ".join(result["words"]), "images": str(result["images"])}
        row |= {"gold, train": signed(line.gain(base, "gold")), "KL": f"{result['kl']:.3g}"}
        row |= {"gold, short": signed(line.gain(base, "gold", sampler="short"))}
        rows.append(row | {"kB": signed(Estimate(-line.gain(base, "jpeg").mean, line.gain(base, "jpeg").half))})
    return rows


def plot_curves(lines: Sequence[Line], path: Path) -> None:
    """Above, the trained reward on the images of training; below, gold on held-out prompts: means over seeds."""
    from matplotlib.figure import Figure

    rewards = list(dict.fromkeys(line.reward for line in lines))
    figure = Figure(figsize=(3.6 * len(rewards), 5.2), layout="constrained", dpi=110)
    panels = figure.subplots(2, len(rewards), squeeze=False)
    for column, reward in enumerate(rewards):
        for line in (line for line in lines if line.reward == reward):
            curves = [run["curve"] for run in line.runs]
            looks = [[(look["images"], look["gold"]) for look in run["looks"]] for run in line.runs]
            for axes, runs in zip(panels[:, column], (curves, looks), strict=True):
                points = [tuple(map(fmean, zip(*at, strict=True))) for at in zip(*runs, strict=False)]
                if not points:  # given pairs have no reward
                    continue
                if len({images for images, _ in points}) == 1:  # all drawn before the first update
                    points = points[-1:]
                axes.plot(*zip(*points, strict=True), ".-", label=line.label, linewidth=1, markersize=4)
        panels[0, column].set_title(f"trained on {reward}", fontsize=9)
        panels[0, column].set_ylabel("reward of training's images", fontsize=8)
        panels[1, column].set_ylabel("gold on held-out prompts", fontsize=8)
        panels[1, column].set_xlabel("images", fontsize=8)
        panels[1, column].legend(fontsize=7, frameon=False)
    for axes in panels.flatten():
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write_pages(out: Path, results: Sequence[Result], base: Result, docs: Path | None) -> list[str]:
    """Write the curves and `training.html` into `out`, and the generated part of `docs`; return the findings.

    Args:
        out: folder of the results.
        results: of the cells that are done.
        base: the base's.
        docs: a Markdown file with the two marker lines, or None. Its pictures go to `images/` beside it.
    """
    lines = table_lines(results)
    rows, said = table_rows(lines, base), findings(lines, base)
    tried = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("tuning/*/result.json"))]
    tries = tuning_rows([result for result in tried if result["prompts"] == base["prompts"]], base)
    images = need_rows(lines)
    plot_curves(lines, out / "curves.png")
    plot = Image.open(out / "curves.png").convert("RGB")
    grids = [(title, Image.open(path).convert("RGB")) for title, path in _grids(out, lines)]
    facts = {"prompts": base["prompts"], "each": EACH, "short": SAMPLERS["short"], "worst": -WORST[1]}
    write_report(
        out / "training.html",
        "bench_training.html",
        rows=rows,
        tries=tries,
        images=images,
        findings=said,
        plot=plot,
        grids=grids,
        **facts,
    )
    if docs is not None:
        parts: list[str | Picture | Shown] = [markdown(rows), "\n".join(f"- {text}" for text in said)]
        parts += ["Images to a given gain, means over seeds:", markdown(images)] if images else []
        parts.append(("Reward and gold against images", "training-curves.png", plot))
        parts += [(title, f"training-{at:02d}.png", grid) for at, (title, grid) in enumerate(grids)]
        parts += ["What was tried on the way:", markdown(tries)] if tries else []
        fill_in(docs, BEGIN, END, parts)
    return said


def _grids(out: Path, lines: Sequence[Line]) -> Iterator[tuple[str, Path]]:
    """Pictures of the same prompts and noise: the base's, then those of each method's first run."""
    yield "base", out / "base.png"
    for line in lines:
        for run in line.runs:
            if run["seed"] == 0:
                yield f"{line.label} on {line.reward}", out / run["cell"] / "after.png"
