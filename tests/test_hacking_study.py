"""The reward-hacking study: cells, a run and its result, its table, findings and pages on synthetic results."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import t2i_align.bench.hacking_study as study_module
from t2i_align.bench.hacking_report import (
    BEGIN,
    END,
    common_proxy,
    findings,
    study_lines,
    table_rows,
    write_pages,
)
from t2i_align.bench.hacking_study import GUARDS, LOOKS, Cell, Study, cells
from t2i_align.errors import T2IError
from t2i_align.training.prompts import make_pool

QUICK = (
    *("method.batch_size=1", "method.group=1", "method.steps=2", "prompts.per_round=1", "prompts.size=4"),
    *("evaluate.prompts.size=2", "evaluate.images=2", "evaluate.steps=1", "evaluate.kl_images=1"),
    "evaluate.features=null",
)


@pytest.mark.parametrize("method", ["draft", "grpo"])
@pytest.mark.parametrize("guard", ["none", "lcb", "kl", "stop"])
def test_cells(guard, method, tmp_path):
    config = Cell(guard, 1, 2_048, method).config(tmp_path)
    assert config.train.steps // config.evaluate.every == LOOKS
    assert (config.evaluate.stop is not None) == (guard == "stop")
    assert config.method["beta" if method == "grpo" else "kl"] > 0 or guard != "kl"
    assert make_pool(config.prompts).prompts.text == make_pool(config.evaluate.prompts).prompts.text
    (reward,) = config.reward.values()
    alone = {"use": "tiny_pick", "options": {"sibling": 1}}
    assert reward == ({"use": "lcb(tiny_pick, k=1)"} if guard == "lcb" else alone)


def test_names_and_refusals(tmp_path):
    names = [cell.name for cell in cells(seeds=2)]
    assert names[:2] == ["none.s0", "lcb.s0"]
    assert len(set(names)) == 2 * len(GUARDS)
    assert cells(method="grpo")[0].name == "grpo.none.s0"
    with pytest.raises(T2IError, match="a round per evaluation, but got 16"):
        Cell("none", 0, 16).config(tmp_path)


def test_a_run_is_measured_on_its_way_and_judged_on_other_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr("t2i_align.bench.hacking_study.LOOKS", 2)
    cell = Cell("none", 0, 2, label="quick", words=QUICK)
    study = Study(tmp_path / "out", tmp_path / "runs", prompts=2)
    assert study.progress(cell) == "to do"
    result = study.run(cell)
    assert [look["images"] for look in result["looks"]] == [0, 1, 2]
    assert (result["looks"][0]["kl"], result["kept"]) == (0.0, 2)
    assert result["looks"][-1]["kl"] > 0
    assert result["reward"] == {"tiny_pick": {"use": "tiny_pick", "options": {"sibling": 0}}}
    assert set(result["scores"]) == {"gold", "proxy", "doubt"}
    before = study.base()["scores"]
    assert before["proxy"] != result["scores"]["proxy"]
    for name in ("before", "peak", "end", "kept"):
        assert Image.open(study.path(cell).parent / f"{name}.png").size == (2 * 130 - 2, 128)
    assert study.run(cell) == json.loads(study.path(cell).read_text())
    assert study.progress(cell) == "done"
    with pytest.raises(T2IError, match="other prompts or images"):
        Study(tmp_path / "out", tmp_path / "runs", prompts=3).run(cell)


def test_warm_makes_its_networks_and_trains_on_the_mean_of_their_weights(tmp_path, monkeypatch):
    small = {"data": {"use": "playground", "prompts": 4, "batch": 2}, "train": {"steps": 1, "learning_rate": 1e-4}}
    monkeypatch.setattr(study_module, "NETWORKS", study_module.NETWORKS | small | {"evaluate": {"share": 0.5}})
    monkeypatch.setattr(study_module, "LOOKS", 2)
    study = Study(tmp_path / "out", tmp_path / "runs", prompts=2)
    results = [study.run(Cell(guard, 0, 2, label="quick", words=QUICK)) for guard in ("warm", "member")]
    folders = [tmp_path / "runs" / "networks.s0" / part / "scorer" for part in ("", "member-0", "member-1", "member-2")]
    mean, *members = (load_file(folder / "open_clip_model.safetensors") for folder in folders)
    name = "visual.conv1.weight"
    assert not torch.equal(members[0][name], members[1][name])
    assert torch.allclose(mean[name], sum(member[name] for member in members) / 3)
    rewards = [result["reward"]["tiny_pick"]["use"] for result in results]
    assert rewards == [str(folder) for folder in folders[:2]]
    assert results[0]["scores"] != results[1]["scores"]


def made(guard, seed, beta, kept=None, final=0.0):
    """A run whose gold follows d (1 - beta log d) exactly, in standard deviations; its proxy is 2 d."""
    kls = [0.0, 0.25, 1.0, 2.25, 4.0, 9.0, 16.0, 36.0]
    looks = []
    for number, kl in enumerate(kls):
        d = math.sqrt(kl)
        gold = 0.5 + 0.2 * d * (1 - beta * math.log(d)) if d else 0.5
        looks.append({"images": 100 * number, "kl": kl, "gold": gold, "proxy": 1 + 3 * 2 * d, "diversity": 0.1})
    scores = {name: [0.5 + final, 0.6 + final, 0.4 + final] for name in ("gold", "proxy", "doubt")}
    return {
        "cell": f"{guard}.s{seed}",
        **{"guard": guard, "seed": seed, "images": 700, "seconds": 60.0, "spread": {"gold": 0.2, "proxy": 3.0}},
        **{"looks": looks, "kept": len(looks) - 1 if kept is None else kept, "scores": scores},
    }


BASE = {"scores": {name: [0.5, 0.6, 0.4] for name in ("gold", "proxy", "doubt")}}


def test_table_and_findings():
    results = [made("none", seed, 0.8, final=-0.1) for seed in range(2)]
    results += [made("stop", seed, 0.8, kept=3, final=0.2) for seed in range(2)]
    lines = study_lines(results)
    assert [line.guard for line in lines] == ["none", "stop"]
    assert common_proxy(lines) == pytest.approx(12)  # of d = 6
    plain, stopped = table_rows(lines, BASE)
    assert (plain["alpha"], plain["beta"]) == ("1", "0.8")
    assert (plain["R2"], stopped["R2"]) == ("1.00", "1.00")
    assert plain["KL where gold turns"] == f"{math.exp(2 * (1 / 0.8 - 1)):.3g}"
    ends = [d * (1 - 0.8 * math.log(d)) for d in (0.5, 1, 1.5, 2, 3, 4, 6)]
    assert (plain["gold at its peak"], plain["gold kept"]) == (f"{max(ends):+.2f}", f"{ends[-1]:+.2f}")
    assert stopped["gold kept"] == f"{ends[2]:+.2f}"
    assert plain["gold at proxy +12.00"] == f"{ends[-1]:+.2f}"
    assert (plain["held-out gold"], stopped["held-out gold"]) == ("-0.100 ± 0.000", "+0.200 ± 0.000")
    said = findings(lines, BASE)
    assert said[0].startswith("none: the weights that are kept have gold")
    assert said[-1] == "stop keeps more than no guard: held-out gold +0.300 ± 0.000, paired by prompt."


def test_gold_at_equal_proxy_lies_between_two_looks():
    (line,) = study_lines([made("none", 0, 0.8)])
    assert line.at_proxy(5.0) == pytest.approx((2 * (1 - 0.8 * math.log(2)) + 3 * (1 - 0.8 * math.log(3))) / 2)
    assert line.at_proxy(0.5) == pytest.approx(0.25 / 0.5 * 0.5 * (1 - 0.8 * math.log(0.5)))
    assert line.at_proxy(13.0) is None


def test_pages(tmp_path):
    results = [made("none", 0, 0.8), made("lcb", 0, 0.2, final=0.1)]
    for run in results:
        for name in ("before", "peak", "end"):
            (tmp_path / run["cell"]).mkdir(exist_ok=True)
            Image.new("RGB", (40, 10), "red").save(tmp_path / run["cell"] / f"{name}.png")
    docs = tmp_path / "docs" / "page.md"
    docs.parent.mkdir()
    docs.write_text(f"by hand\n{BEGIN}\nstale words\n{END}\nafter\n")
    write_pages(tmp_path, results, BASE, docs)
    text = docs.read_text()
    assert text.startswith("by hand")
    assert "stale words" not in text
    assert "| lcb | 1 | 700 | 60 |" in text
    assert (tmp_path / "curves.png").is_file()
    with Image.open(docs.parent / "images" / "hacking-pictures.png") as sheet:
        assert sheet.size == (40, 5 * (10 + 16 + 2) - 2)  # base, and two rows for each guard


def test_the_command_lists_its_cells(cli, tmp_path):
    folders = ("--out", tmp_path / "out", "--work", tmp_path / "runs")
    code, out, _ = cli("bench", "hacking-study", "--list", *folders)
    assert code == 0
    assert "to do  warm.s2" in out
    code, _, err = cli("bench", "hacking-study", "train.learning_rate=1", *folders)
    assert code == 2
    assert "Expected a --label" in err
    code, _, err = cli("bench", "hacking-study", "--method", "prdp", *folders)
    assert code == 2
    assert "draft, grpo" in err
