"""The steering bench's table, plot and pages, from the cells' results alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from PIL import Image
from scipy.stats import t as student

from t2i_align.bench.pages import Picture, Shown, fill_in
from t2i_align.bench.steering import BUDGETS, GOLD, KINDS
from t2i_align.report import write_report
from t2i_align.steering.best_of_n import best_shares

BEGIN, END = "<!-- steering bench: begin -->", "<!-- steering bench: end -->"
SCALES = ("gold", "proxy")
SPREAD = "spread"  # of the proxy within a prompt, known of the base

Result = dict[str, Any]


class Estimate(NamedTuple):
    """A mean over prompts and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if math.isnan(self.half) else f" ± {self.half:.3f}")

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value per prompt."""
    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return Estimate(known[0] if known else math.nan, math.nan)
    width = float(student.ppf(0.975, len(known) - 1)) * stdev(known) / math.sqrt(len(known))
    return Estimate(fmean(known), width)


class Line(NamedTuple):
    """A row of the table: per prompt `gold`, `proxy` (means over seeds) and `diversity`; what it cost."""

    pipeline: str
    label: str
    reward: str
    budget: str
    charge: float
    calls: float
    seconds: float
    values: Mapping[str, list[float]]
    kinds: list[str]

    def of_kind(self, name: str, kind: str | None = None) -> list[float]:
        """One value per prompt, of one kind of prompts or of all."""
        return [v for v, k in zip(self.values[name], self.kinds, strict=True) if kind in (None, k)]


def table_lines(results: Sequence[Result]) -> list[Line]:
    """The base, best-of-n at every budget (estimated from its 16 samples), and the cells, by pipeline and reward."""
    lines: list[Line] = []
    for result in results:
        if result["method"] == "best_of_n":
            lines += _best_of_n_lines(result, first=not any(line.pipeline == result["pipeline"] for line in lines))
        else:
            lines.append(_cell_line(result))
    order = {line.label: at for at, line in reversed(list(enumerate(lines)))}
    return sorted(lines, key=lambda line: (line.pipeline, line.reward != "-", line.reward != GOLD, order[line.label]))


def _cell_line(result: Result) -> Line:
    values = {name: [fmean(row[name]) for row in result["rows"]] for name in SCALES}
    values["diversity"] = [row["diversity"] for row in result["rows"]]
    budget = "-" if result["budget"] is None else f"{result['budget']}x"
    cost, label = result["cost"], result["label"] or result["method"]
    own = (result["pipeline"], label, result["reward"], budget, result["charge"], cost["forwards"], result["seconds"])
    return Line(*own, values, result["kinds"])


def _best_of_n_lines(result: Result, first: bool) -> Iterator[Line]:
    """The full best-of-n, its estimates at smaller budgets and, once per pipeline, plain samples."""
    whole, samples = _cell_line(result), len(result["rows"][0]["all_gold"][0])
    nowhere = [math.nan] * len(result["rows"])

    def part(label: str, reward: str, budget: str, n: int) -> Line:
        values = {name: [_subset_best(row, result, name, n) for row in result["rows"]] for name in SCALES}
        share = n / samples
        spent = (whole.charge * share, whole.calls * share, whole.seconds * share)
        return Line(result["pipeline"], label, reward, budget, *spent, {**values, "diversity": nowhere}, whole.kinds)

    if first:
        base = part("base", "-", "1x", 1)
        yield base._replace(values={**base.values, SPREAD: [_spread(row) for row in result["rows"]]})
    for budget in BUDGETS:
        if budget < samples:
            yield part("best_of_n", result["reward"], f"{budget}x", budget)
    yield whole


def _spread(row: Mapping[str, Any]) -> float:
    """The proxy's standard deviation among plain samples of a prompt with one seed; root mean square over seeds."""
    return math.sqrt(fmean(stdev(values) ** 2 for values in row["all_proxy"]))


def _subset_best(row: Mapping[str, Any], result: Result, name: str, n: int) -> float:
    """Expected score of the best by the cell's reward of `n` random samples, seeds averaged."""
    by = "all_gold" if result["reward"] == GOLD else "all_proxy"
    return fmean(_expected(judged, values, n) for judged, values in zip(row[by], row[f"all_{name}"], strict=True))


def _expected(judged: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the sample that is judged best of `n` random ones; equally judged ones share theirs."""
    scores, kept = torch.tensor(judged, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    tied = torch.stack([kept[scores == score].mean() for score in scores])
    return float((tied[scores.argsort()] * best_shares(len(scores), n)).sum())


def markdown_table(lines: Sequence[Line]) -> str:
    """The table as it stands in the documentation."""
    head = "| pipeline | method | reward | budget | cost | calls | s | gold | gold, two objects | gold, counts |"
    head += " proxy | diversity |\n" + "|---" * 12 + "|"
    return "\n".join([head, *(f"| {' | '.join(cells_of(line).values())} |" for line in lines)])


def cells_of(line: Line) -> dict[str, str]:
    """A line's cells by column: cost in plain samples; calls, seconds per returned image."""
    shown = {"pipeline": line.pipeline, "method": line.label, "reward": line.reward, "budget": line.budget}
    shown |= {"cost": f"{line.charge:.1f}x", "calls": f"{line.calls:.0f}", "s": f"{line.seconds:.2f}"}
    shown["gold"] = str(estimate(line.of_kind("gold")))
    shown |= {f"gold, {kind}": str(estimate(line.of_kind("gold", kind))) for kind in KINDS}
    diversity = estimate(line.values["diversity"])
    shown |= {"proxy": str(estimate(line.of_kind("proxy")))}
    return shown | {"diversity": "-" if math.isnan(diversity.mean) else str(diversity)}


def findings(lines: Sequence[Line], proxy: str) -> list[str]:
    """What was expected of the bench, and whether it came."""
    said = []
    for kind, what in zip(KINDS, ("two-object", "count"), strict=True):
        said += list(_against_best_of_n(lines, kind, what))
    base = {line.pipeline: line for line in lines if line.label == "base"}
    for line in lines:
        if line.label == "reno" and line.pipeline in base:
            plain = base[line.pipeline]
            gains = zip(_differences(line, plain, "proxy"), plain.values[SPREAD], strict=True)
            share = fmean(gain >= spread for gain, spread in gains)
            said.append(
                f"reno ({line.charge:.0f}x) raises the proxy by one standard deviation of a prompt's own samples on "
                f"{share:.0%} of prompts."
            )
    for line in lines:
        if line.reward == proxy and line.pipeline in base:
            up, gold = (estimate(_differences(line, base[line.pipeline], name)) for name in ("proxy", "gold"))
            if up.sure and up.mean > 0 and gold.mean - gold.half <= 0:
                verdict = "falls: the proxy is hacked" if gold.sure else "does not measurably rise"
                where = f"{line.label} {line.budget} on {line.pipeline}"
                said.append(f"{where}: the proxy rises by {up}, gold changes by {gold}: gold {verdict}.")
    return said


def _against_best_of_n(lines: Sequence[Line], kind: str, what: str) -> Iterator[str]:
    """How each gold-steered method compares with best-of-n at its budget, prompt by prompt."""
    steered = [line for line in lines if line.reward == GOLD]
    for other in (line for line in steered if line.label == "best_of_n"):
        yield f"best_of_n at {other.budget}, {what} prompts: gold {estimate(other.of_kind('gold', kind))}, at most 1."
        for line in steered:
            if line is not other and (line.pipeline, line.budget) == (other.pipeline, other.budget):
                gain = estimate(_differences(line, other, "gold", kind))
                verdict = "better" if gain.sure and gain.mean > 0 else "worse" if gain.sure else "not distinguishable"
                yield f"{line.label} at {line.budget}, {what} prompts: gold {gain} against best-of-n ({verdict})."


def _differences(line: Line, other: Line, name: str, kind: str | None = None) -> list[float]:
    return [a - b for a, b in zip(line.of_kind(name, kind), other.of_kind(name, kind), strict=True)]


def plot_budgets(lines: Sequence[Line], path: Path) -> None:
    """Gold against cost: one panel per pipeline and reward, one line per method, with intervals."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((line.pipeline, line.reward) for line in lines if line.reward != "-"))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained", dpi=110)
    for axes, (pipeline, reward) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        mine = [line for line in lines if line.pipeline == pipeline and line.reward in (reward, "-")]
        start = [line for line in mine if line.label == "base"]
        for label in dict.fromkeys(line.label for line in mine if line.label != "base"):
            points = start + [line for line in mine if line.label == label]
            points.sort(key=lambda line: line.charge)
            golds = [estimate(line.of_kind("gold")) for line in points]
            costs, means = [line.charge for line in points], [gold.mean for gold in golds]
            axes.errorbar(costs, means, [gold.half for gold in golds], marker=".", capsize=2, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{pipeline}, steered by {reward}", fontsize=9)
        axes.set_xlabel("cost in plain samples", fontsize=8)
        axes.set_ylabel("gold reward", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def write_pages(out: Path, results: Sequence[Result], docs: Path | None) -> list[str]:
    """Write the plot and `steering.html` into `out`, and the generated part of `docs`; return the findings.

    Args:
        out: folder of the results.
        results: of the cells that are done.
        docs: a Markdown file with the two marker lines, or None. It links the pictures of `out`.
    """
    lines, proxy = table_lines(results), results[0]["proxy"]
    said = findings(lines, proxy)
    plot_budgets(lines, out / "gold.png")
    shown = list(_grids(out, results))
    grids = [(title, Image.open(path).convert("RGB")) for title, path in shown]
    rows = [cells_of(line) for line in lines]
    facts = {"prompts": len(results[0]["rows"]), "seeds": results[0]["seeds"], "proxy": proxy}
    plot = Image.open(out / "gold.png").convert("RGB")
    write_report(
        out / "steering.html", "bench_steering.html", rows=rows, findings=said, plot=plot, grids=grids, **facts
    )
    if docs is not None:
        parts: list[str | Picture | Shown] = [markdown_table(lines), ("Gold against cost", out / "gold.png")]
        fill_in(docs, BEGIN, END, [*parts, "\n".join(f"- {text}" for text in said), *shown])
    return said


def _grids(out: Path, results: Sequence[Result]) -> Iterator[tuple[str, Path]]:
    """Pictures before and after: plain samples of a pipeline, then each cell at its largest budget."""
    for result in results:
        folder = out / result["cell"]
        if (folder / "plain.png").is_file() and result["reward"] != GOLD:
            yield f"{result['pipeline']}: plain samples", folder / "plain.png"
    for result in results:
        if result["budget"] in (max(BUDGETS), None):
            budget = "" if result["budget"] is None else f", {result['budget']}x"
            label = result["label"] or result["method"]
            yield f"{result['pipeline']}: {label} by {result['reward']}{budget}", out / result["cell"] / "best.png"
