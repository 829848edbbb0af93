"""The reward-hacking study's table, curves and pictures, from the cells' results alone.

Gains on the way count in standard deviations of the scores of the base's images, so that gold and proxy share an axis;
fits are Gao et al.'s, over the looks of all seeds (`hacking.py`). Gold of the weights that are kept in the end is
measured on other prompts, in its own unit, and paired with the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from t2i_align.bench.efficiency import Points, crossing
from t2i_align.bench.hacking import number, peak_of
from t2i_align.bench.hacking_study import CONTROLS, GUARDS, LOOKS, UNGUARDED
from t2i_align.bench.pages import Picture, Shown, fill_in
from t2i_align.bench.steering_report import Estimate, estimate
from t2i_align.bench.training_report import markdown, signed
from t2i_align.data.images import contact_sheet
from t2i_align.rewards.diagnostics import Curve, fit_overoptimisation

BEGIN, END = "<!-- hacking study: begin -->", "<!-- hacking study: end -->"
COLORS = {
    "none": "#222222",
    "lcb": "#3b6ea5",
    "kl": "#2a9d5c",
    "stop": "#b8860b",
    "warm": "#b0413e",
    "member": "#8a8f98",
}

Result = dict[str, Any]


class Line(NamedTuple):
    """The runs of a guard, one per seed."""

    guard: str
    runs: list[Result]

    def pooled(self, name: str) -> Tensor:
        """Gains of a score, base standard deviations, at the looks of all runs that are away from the base."""
        return torch.tensor([value for run in self.runs for value in gains(run, name)[1:]], dtype=torch.float64)

    @property
    def d(self) -> Tensor:
        """sqrt(KL) of these looks."""
        kls = [look["kl"] for run in self.runs for look in run["looks"][1:]]
        return torch.tensor(kls, dtype=torch.float64).clamp(min=0).sqrt()

    def fit(self, name: str) -> Curve | None:
        """Gao's curve of a score; None where there are too few looks for its two numbers."""
        moved = self.d > 0
        if int(moved.sum()) < 3:
            return None
        return fit_overoptimisation(self.d[moved], self.pooled(name)[moved], best_of_n=False)

    def explained(self, fit: Curve) -> float:
        """Share of the variance of gold over the looks of all runs that their curve explains."""
        moved = self.d > 0
        return fit.r2(self.d[moved], self.pooled("gold")[moved])

    def peak(self) -> float:
        """Gold at each run's best look, base standard deviations."""
        return fmean(max(gains(run, "gold")) for run in self.runs)

    def kept(self, name: str) -> float:
        """Gain at the look of the weights that a run keeps: the last, or with a stop the best."""
        return fmean(gains(run, name)[run["kept"]] for run in self.runs)

    def end(self, name: str) -> float:
        """Of a number of the last look."""
        return fmean(run["looks"][-1][name] for run in self.runs)

    def final(self, base: Result, name: str) -> Estimate:
        """The gain of the kept weights on prompts of their own, with its interval over them, seeds averaged."""
        return estimate([fmean(values) for values in zip(*self.finals(base, name), strict=True)])

    def finals(self, base: Result, name: str) -> list[list[float]]:
        """By seed, the gain of every prompt."""
        before = base["scores"][name]
        return [[a - b for a, b in zip(run["scores"][name], before, strict=True)] for run in self.runs]

    def at_proxy(self, level: float) -> float | None:
        """Gold where runs first reach a proxy gain; None where one does not."""
        found = [gold_at(run, level) for run in self.runs]
        known = [value for value in found if value is not None]
        return fmean(known) if len(known) == len(found) else None


def gains(run: Result, name: str) -> list[float]:
    """Gains of a score at a run's looks, in standard deviations of the base's images."""
    start, spread = run["looks"][0][name], run["spread"][name] or 1.0
    return [(look[name] - start) / spread for look in run["looks"]]


def gold_at(run: Result, level: float) -> float | None:
    """Gold where a run first reaches a proxy gain, on the straight line between two looks."""
    gold, proxy = gains(run, "gold"), gains(run, "proxy")
    at = crossing([(float(look), value) for look, value in enumerate(proxy)], level)
    if at is None:
        return None
    before, share = int(at), at - int(at)
    return gold[before] + share * (gold[min(before + 1, len(gold) - 1)] - gold[before])


def study_lines(results: Sequence[Result]) -> list[Line]:
    """The runs by guard."""
    found = {guard: [run for run in results if run["guard"] == guard] for guard in GUARDS}
    return [Line(guard, runs) for guard, runs in found.items() if runs]


def common_proxy(lines: Sequence[Line]) -> float:
    """The largest proxy gain that all runs which go on to the end reach; they are compared there."""
    tops = [max(gains(run, "proxy")) for line in lines if line.guard != "stop" for run in line.runs]
    return min(tops) if tops else 0.0


def table_rows(lines: Sequence[Line], base: Result) -> list[dict[str, str]]:
    """The cells of the table by column."""
    level, rows = common_proxy(lines), []
    for line in lines:
        fit = line.fit("gold")
        peak, kept = line.peak(), line.kept("gold")
        row = {"guard": line.guard, "seeds": str(len(line.runs))}
        row |= {name: f"{fmean(run[name] for run in line.runs):.0f}" for name in ("images", "seconds")}
        row |= {"KL at the end": number(line.end("kl")), "proxy kept": f"{line.kept('proxy'):+.2f}"}
        row |= {"gold at its peak": f"{peak:+.2f}", "gold kept": f"{kept:+.2f}"}
        row |= {f"gold at proxy {level:+.2f}": "-" if (at := line.at_proxy(level)) is None else f"{at:+.2f}"}
        row |= {"alpha": number(fit and fit.alpha), "beta": number(fit and fit.beta)}
        row |= {"R2": f"{line.explained(fit):.2f}" if fit else "-"}
        row |= {"KL where gold turns": number(fit and peak_of(fit, line.d))}
        row |= {"held-out gold": signed(line.final(base, "gold")), "held-out proxy": signed(line.final(base, "proxy"))}
        rows.append(row)
    return rows


def findings(lines: Sequence[Line], base: Result) -> list[str]:
    """What is lost without a guard, and what each guard keeps."""
    mine = {line.guard: line for line in lines}
    said = []
    for line in lines:
        kept, peak = line.kept("gold"), line.peak()
        share = f"{kept / peak:.0%} of the {peak:+.2f} at its peak" if peak > 0 else f"of no gain ({peak:+.2f})"
        said.append(
            f"{line.guard}: the weights that are kept have gold {kept:+.2f} and proxy {line.kept('proxy'):+.2f} base "
            f"standard deviations, {share}; on other held-out prompts gold {signed(line.final(base, 'gold'))}."
        )
    for line in lines:
        control = CONTROLS.get(line.guard, UNGUARDED)
        if control == line.guard or control not in mine:
            continue
        both = {run["seed"] for run in line.runs} & {run["seed"] for run in mine[control].runs}
        if not both:
            continue
        pairs = ([run for run in each.runs if run["seed"] in both] for each in (line, mine[control]))
        means = [map(fmean, zip(*(run["scores"]["gold"] for run in runs), strict=True)) for runs in pairs]
        less = estimate([a - b for a, b in zip(*means, strict=True)])
        verdict = ("keeps more" if less.mean > 0 else "keeps less") if less.sure else "keeps no more, measurably,"
        against = "no guard" if control == UNGUARDED else control
        said.append(f"{line.guard} {verdict} than {against}: held-out gold {signed(less)}, paired by prompt.")
    return said


def path_rows(result: Result) -> list[dict[str, float]]:
    """The looks of a run, for people who tune."""
    columns = {name: gains(result, name) for name in ("gold", "proxy")}
    rows = []
    for at, look in enumerate(result["looks"]):
        row = {name: look[name] for name in ("images", "kl", "gold", "proxy", "diversity") if name in look}
        rows.append(row | {f"{name} gain": round(values[at], 3) for name, values in columns.items()})
    return rows


def plot_study(lines: Sequence[Line], path: Path) -> None:
    """Gold and proxy over sqrt(KL), points of all seeds with fits; gold over proxy, means over seeds."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=110)
    gold, proxy, both = figure.subplots(1, 3)
    for line in lines:
        color = COLORS[line.guard]
        for axes, name in ((gold, "gold"), (proxy, "proxy")):
            axes.plot(line.d, line.pooled(name), ".", color=color, markersize=4, alpha=0.6)
            fit = line.fit(name)
            if fit is not None:
                at = torch.linspace(1e-3, float(line.d.max()), 100, dtype=torch.float64)
                axes.plot(at, fit.at(at), color=color, linewidth=1.2, label=line.guard)
        paths: list[Points] = [list(zip(gains(run, "proxy"), gains(run, "gold"), strict=True)) for run in line.runs]
        means = [tuple(map(fmean, zip(*at, strict=True))) for at in zip(*paths, strict=False)]
        both.plot(*zip(*means, strict=True), ".-", color=color, linewidth=1, markersize=4, label=line.guard)
    for axes, x, y in ((gold, "sqrt(KL)", "gold"), (proxy, "sqrt(KL)", "proxy"), (both, "proxy", "gold")):
        axes.axhline(0, color="#b0b7bf", linewidth=1)
        axes.set_xlabel(x, fontsize=8)
        axes.set_ylabel(f"{y}, base standard deviations", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def picture_rows(out: Path, lines: Sequence[Line]) -> Image.Image | None:
    """Pictures of the same prompts and noise: the base's, those of each guard at its gold's peak and at the end."""
    rows: list[tuple[str, Path]] = []
    for line in lines:
        for run in line.runs:
            folder = out / run["cell"]
            if run["seed"] == 0 and (folder / "before.png").is_file():
                rows = rows or [("base", folder / "before.png")]
                looks = run["looks"]
                peak = max(range(len(looks)), key=lambda at: looks[at]["gold"])
                for name, at in (("peak", peak), ("end", len(looks) - 1)):
                    said = f"{line.guard}, {'gold at its best' if name == 'peak' else 'at the end'}: "
                    said += f"gold {gains(run, 'gold')[at]:+.2f}, proxy {gains(run, 'proxy')[at]:+.2f} sd"
                    rows.append((said + f", KL {looks[at]['kl']:.0f}", folder / f"{name}.png"))
    if not rows:
        return None
    strips = [Image.open(path).convert("RGB") for _, path in rows]
    return contact_sheet(strips, 1, labels=[label for label, _ in rows])


def write_pages(out: Path, results: Sequence[Result], base: Result, docs: Path | None) -> list[str]:
    """Write `curves.png` and `pictures.png` into `out`, and the generated part of `docs`; return the findings.

    Args:
        out: folder of the results.
        results: of the cells that are done.
        base: the base's.
        docs: a Markdown file with the two marker lines, or None. Its pictures go to `images/` beside it.
    """
    lines = study_lines(results)
    said = findings(lines, base)
    plot_study(lines, out / "curves.png")
    pictures = picture_rows(out, lines)
    if pictures is not None:
        pictures.quantize(256).save(out / "pictures.png", optimize=True)
    if docs is not None:
        plot = Image.open(out / "curves.png").convert("RGB")
        parts: list[str | Picture | Shown] = [markdown(table_rows(lines, base)), "\n".join(f"- {t}" for t in said)]
        curves = f"Gold and proxy at the {LOOKS} looks of each run; lines are fits of d (alpha - beta log d)"
        parts.append((curves, "hacking-curves.png", plot))
        if pictures is not None:
            parts.append(("The same prompts and noise, seed 0", "hacking-pictures.png", pictures))
        fill_in(docs, BEGIN, END, parts)
    return said
