"""Over-optimisation curves of runs, on synthetic ones."""

import json
import math

import pytest

from t2i_align.bench.hacking import read_run
from t2i_align.errors import T2IError

BASE = [[0.0, 2.0], [2.0, 0.0]]  # mean 1, standard deviation 1


def write(folder, alpha, beta, kls=(0.5, 1.0, 2.0, 5.0, 20.0, 60.0)):
    """A run whose gold follows the curve exactly, in standard deviations; its proxy never turns."""
    folder.mkdir()
    rows = [{"step": 0, "kl": 0.0, "reward": 1.0, "verifier": 1.0, "scores": {"reward": BASE, "verifier": BASE}}]
    for step, kl in enumerate(kls, start=1):
        d = math.sqrt(kl)
        rows.append({"step": step, "kl": kl, "reward": 1 + 2 * d, "verifier": 1 + d * (alpha - beta * math.log(d))})
    (folder / "evaluations.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_the_curve_of_a_run_is_recovered(tmp_path):
    run = read_run(write(tmp_path / "hacked", 1.0, 0.8), "verifier")
    row = run.row()
    assert (row["alpha"], row["beta"]) == pytest.approx((1.0, 0.8), abs=1e-9)
    assert row["peak KL"] == pytest.approx(math.exp(2 * (1 / 0.8 - 1)))
    assert (run.proxy_fit.alpha, run.proxy_fit.beta) == pytest.approx((2.0, 0.0), abs=1e-9)
    gold = [math.sqrt(kl) * (1 - 0.8 * math.log(math.sqrt(kl))) for kl in (0.5, 1.0, 2.0, 5.0, 20.0, 60.0)]
    assert row["kept"] == pytest.approx(gold[-1] / max(gold))
    assert (row["KL"], row["proxy gain"]) == pytest.approx((60, 2 * math.sqrt(60)))


def test_a_gold_that_never_turns_has_no_peak(tmp_path):
    assert read_run(write(tmp_path / "honest", 0.5, 0.0), "verifier").row()["peak KL"] is None
    assert read_run(write(tmp_path / "rising", 0.5, -0.1), "verifier").row()["peak KL"] is None


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(T2IError, match="to be the folder of a run"):
        read_run(tmp_path, "verifier")
    with pytest.raises(T2IError, match="watched reward, verifier, not 'judge'"):
        read_run(write(tmp_path / "a", 1.0, 0.5), "judge")
    with pytest.raises(T2IError, match="3 or more evaluations"):
        read_run(write(tmp_path / "b", 1.0, 0.5, (1.0, 2.0)), "verifier")
    for text in ("", '{"step": 0, "kl": 0, "scores": {"verifier": [[0.5]]}}\n'):  # killed at once; a person's choices
        (tmp_path / "b" / "evaluations.jsonl").write_text(text)
        with pytest.raises(T2IError, match="evaluations of the trained reward"):
            read_run(tmp_path / "b", "verifier")


def test_the_command(tmp_path, cli):
    runs = [str(write(tmp_path / name, 1.0, beta)) for name, beta in (("plain", 0.8), ("$5_^ and $6", 0.2))]
    code, out, _ = cli("bench", "hacking", *runs, "--out", str(tmp_path / "curves.png"), "--json")
    assert code == 0
    assert [row["run"] for row in json.loads(out)] == ["plain", "$5_^ and $6"]
    assert (tmp_path / "curves.png").stat().st_size > 1000
    code, out, _ = cli("bench", "hacking", *runs)
    assert (code, "peak KL" in out) == (0, True)
