"""The steering bench: sizes that the budget pays, honest estimates, cells that are run once, pages."""

import itertools
import json
from statistics import fmean

import pytest

from t2i_align.bench.prices import Prices
from t2i_align.bench.steering import GOLD, Bench, Cell, bench_prompts, cells, settings_of
from t2i_align.bench.steering_report import BEGIN, END, _expected, estimate, table_lines, write_pages
from t2i_align.errors import T2IError
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim, ode
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.steering import Ctx, load_method

PRICES = Prices(backward=2.0, decode=0.4, decode_backward=1.0, seconds=0.01)


@pytest.mark.parametrize("cell", [c for c in cells("tiny_pick") if c.budget], ids=lambda cell: cell.name)
def test_a_cell_spends_its_budget_and_no_more(cell):
    """On the toy, with the cost that the method itself counts; one size more would be too much."""
    rows = 1 if cell.pipeline == "tiny-turbo" else 10
    settings = settings_of(cell, rows, PRICES, spread=1.0)
    reward = FunctionScorer(lambda images: images[:, 0, 0, 0], "first", differentiable=True)
    kernel = ode() if cell.method in ("reno", "noise_search") else ddim(1.0)

    def charge(settings):
        ctx = Ctx(Driver(toy_pipeline()), reward, rows, kernel, max_batch=1000)
        load_method(cell.method, **settings)(ctx, Prompts.of("0"))
        return PRICES.charge(ctx.cost, rows)

    spent = charge(settings)
    knob = {"svdd": "candidates", "noise_search": "rounds", "reno": "iterations"}.get(cell.method, "particles")
    assert spent <= cell.budget
    assert charge(settings | {knob: settings[knob] + 1}) > cell.budget


def test_too_small_a_budget_is_said():
    with pytest.raises(T2IError, match="too small for das"):
        settings_of(Cell("das", GOLD, 1), 25, PRICES, 1.0)


def test_best_of_n_from_more_samples_is_the_mean_over_all_subsets():
    judged, values = [0.3, 0.1, 0.9, 0.5, 0.2], [1.0, 2.0, 3.0, 4.0, 5.0]
    for n in range(1, 6):
        subsets = itertools.combinations(range(5), n)
        exact = fmean(values[max(subset, key=lambda i: judged[i])] for subset in subsets)
        assert _expected(judged, values, n) == pytest.approx(exact)
    assert _expected([1, 1, 0], [2.0, 4.0, 9.0], 2) == pytest.approx(3.0)  # a tie is broken by a coin


def test_prompts_are_held_out_pairs_and_counts():
    table, kinds = bench_prompts(8)
    assert kinds == ["pair"] * 4 + ["group"] * 4
    assert len(set(table.text)) == 8
    assert bench_prompts(8) == (table, kinds)
    assert len({cell.name for cell in cells("tiny_pick")}) == len(cells("tiny_pick"))


def test_intervals():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.half) == pytest.approx((2.5, 3.182446 * 1.290994 / 2), rel=1e-5)
    assert found.sure == (found.mean > found.half)


def test_a_cell_is_run_once_and_shown(tmp_path):
    bench = Bench(tmp_path, "tiny_clip", prompts=2, seeds=2)
    prices = Prices(2.0, 0.4, 1.0, 0.01)._asdict()
    base = {"prices": prices, "spreads": {GOLD: 0.2, "tiny_clip": 0.05}}
    (tmp_path / "tiny-sd.base.json").write_text(json.dumps(base))
    wanted = [Cell("best_of_n", "tiny_clip", 3), Cell("fk", GOLD, 3, label="fk-diff")]
    results = [bench.run(cell) for cell in wanted]
    files = [tmp_path / cell.name / "result.json" for cell in wanted]
    before = [path.stat().st_mtime_ns for path in files]
    assert [Bench(tmp_path, "tiny_clip", 2, 2).run(cell) for cell in wanted] == results
    assert [path.stat().st_mtime_ns for path in files] == before
    with pytest.raises(T2IError, match="other prompts, seeds or proxy"):
        Bench(tmp_path, "tiny_clip", 4, 2).run(wanted[0])
    assert results[0]["charge"] == pytest.approx(3)
    assert len(results[0]["rows"][0]["all_gold"][0]) == 3
    lines = table_lines(results)
    assert [line.label for line in lines] == ["base", "fk-diff", "best_of_n"]
    docs = tmp_path / "page.md"
    docs.write_text(f"before\n{BEGIN}\nstale words\n{END}\nafter\n")
    write_pages(tmp_path, results, docs)
    text = docs.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "stale words" not in text
    assert "| tiny-sd | fk-diff | verifier | 3x |" in text
    assert (tmp_path / "steering.html").read_text().count("data:image/png") >= 2
    docs.write_text("no markers")
    with pytest.raises(T2IError, match="Expected .*page.md to have the lines"):
        write_pages(tmp_path, results, docs)


def test_the_verb_lists_its_cells(cli, tmp_path):
    code, out, _ = cli("bench", "steering", "--list", "--out", tmp_path)
    assert code == 0
    assert "to do  tiny-sd.fk-diff.verifier.16x" in out
    code, _, err = cli("bench", "steering", "--only", "nothing", "--out", tmp_path)
    assert code == 2
    assert "Expected --only" in err
