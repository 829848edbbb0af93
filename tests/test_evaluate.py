"""`t2i.evaluate`: intervals, win rates, both arms on the same noise, and a pipeline that is left as it was."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from t2i_align.cli.tables import print_json
from t2i_align.errors import T2IError
from t2i_align.evaluation import compare, evaluate, interval
from t2i_align.pipelines import call_defaults
from t2i_align.pipelines.catalog import find_pipeline
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.rewards import FunctionScorer, Scorer
from tests.families import FAMILIES

PROMPTS = ["0.1", "0.5", "0.9"]


def red(images):
    return images[:, 0].mean((1, 2))


class InTheWay(Scorer):
    """Makes a folder where the page was to be."""

    name = "in_the_way"

    def forward(self, images, prompts):
        Path("page.html").mkdir()
        return red(images)


@pytest.fixture
def sd():
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_interval_is_students():
    values = torch.tensor([1.0, 2.0, 4.0, float("nan")])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1, 2, 4]))
    assert interval(values) == pytest.approx((7 / 3, low, high))
    alone = interval(torch.tensor([3.0]))
    assert alone.mean == 3
    assert math.isnan(alone.low)


def test_intervals_hold_what_they_say():
    g = torch.Generator().manual_seed(0)
    held = [interval(torch.randn(12, generator=g) + 1) for _ in range(2000)]
    assert sum(found.low <= 1 <= found.high for found in held) / 2000 == pytest.approx(0.95, abs=0.015)


def test_comparison_by_hand():
    base = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, float("nan")]])
    tuned = torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, float("nan")]])
    found = compare(base, tuned)
    assert found.gain.mean == pytest.approx((1 + 0 - 1) / 3)
    assert found.base.mean == pytest.approx((0.5 + 1 + 2) / 3)
    assert found.win_rate == pytest.approx(0.5)
    assert (found.prompts, found.invalid) == (3, 1)


def test_pairing_narrows_the_interval():
    g = torch.Generator().manual_seed(1)
    base = 10 * torch.randn(30, 1, generator=g)
    found = compare(base, base + 0.5 + 0.1 * torch.randn(30, 1, generator=g))
    assert found.gain.low > 0.4
    assert found.base.high - found.base.low > 5


def test_a_pipeline_alone(tmp_path):
    found = evaluate(toy_pipeline(size=8), PROMPTS, [red], images=2, steps=3, html=tmp_path / "page.html")
    assert list(found.scores) == ["base"]
    assert found.scores["base"]["red"].shape == (3, 2)
    assert found.comparisons["red"].gain.mean == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 6
    assert "tuned" not in page


def test_full_weights_against_their_base(tmp_path):
    pipe = toy_pipeline(size=8)
    policy = Policy.full(pipe)
    with torch.no_grad():
        policy.trainable()[0].add_(2.0)
    pipe.register_to_config(_name_or_path=str(find_pipeline("tiny-sd")))  # as if it had been loaded from there
    policy.save(tmp_path / "model")
    assert call_defaults(tmp_path / "model") == call_defaults("tiny-sd")
    fresh = toy_pipeline(size=8)
    found = evaluate(fresh, PROMPTS, [red], lora=tmp_path / "model", images=2, steps=3, html=tmp_path / "page.html")
    assert found.comparisons["red"].gain.low > 0.05
    assert found.comparisons["red"].win_rate == 1
    assert not fresh.denoiser.shift.any()
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 12
    assert "100 %" in page


def test_a_lora_is_measured_on_the_same_noise_and_taken_off_again(sd, tmp_path):
    policy = Policy.lora(sd, rank=2)
    policy.save(tmp_path / "same")
    with torch.no_grad():
        for p in policy.trainable():
            p.add_(0.1)
    policy.save(tmp_path / "lora")
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    pipe.set_progress_bar_config(disable=True)
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    names = [name for name, _ in pipe.unet.named_parameters()]
    call = {"images": 1, "steps": 2, "guidance": 1.0}
    same = evaluate(pipe, PROMPTS[:2], [red], lora=tmp_path / "same", **call)
    assert torch.equal(same.scores["base"]["red"], same.scores["tuned"]["red"])
    found = evaluate(pipe, PROMPTS[:2], [red], lora=tmp_path / "lora", **call)
    assert torch.equal(found.scores["base"]["red"], same.scores["base"]["red"])
    assert not torch.equal(found.scores["base"]["red"], found.scores["tuned"]["red"])
    assert not hasattr(pipe.unet, "peft_config")
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    left = [name.replace(".base_layer", "") for name, _ in pipe.unet.named_parameters()]
    assert left == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rewards": []}, "one or more rewards"),
        ({"rewards": "verifer"}, "Did you mean 'verifier'"),
        ({"rewards": "verifier", "lora": "nowhere"}, "No such LoRA: nowhere"),
        ({"rewards": "verifier", "images": 0}, "1 or more images"),
        ({"rewards": "verifier,jpeg_compressibility,verifier"}, "different names but got verifier twice"),
        ({"rewards": [lambda images: images, lambda images: -images]}, "different names but got lambda twice"),
        ({"rewards": "verifier", "html": "/proc/t2i-align/page.html"}, "html: the folder /proc cannot be written"),
        ({"rewards": "verifier", "html": "/proc"}, "html to be a file to write but /proc is a folder"),
        ({"rewards": "verifier", "prompts": "a dog"}, "cannot score 'a dog'"),
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(options, said, monkeypatch):
    monkeypatch.setattr("t2i_align.evaluation.load_pipeline", None)
    with pytest.raises(T2IError, match=said):
        evaluate("tiny-sd", **({"prompts": "a red circle"} | options))


def test_functions_with_names_of_their_own_are_both_measured():
    rewards = [FunctionScorer(red, "red"), FunctionScorer(lambda images: -red(images), "not red")]
    found = evaluate(toy_pipeline(size=8), PROMPTS, rewards, images=1, steps=2)
    assert list(found.comparisons) == ["red", "not red"]
    assert found.comparisons["red"].base.mean == -found.comparisons["not red"].base.mean


def test_the_command_refuses_in_one_sentence(cli, monkeypatch):
    code, _, err = cli("evaluate", "a red circle", "--rewards", "verifer")
    assert code == 2
    assert "Did you mean 'verifier'" in err
    monkeypatch.setattr("t2i_align.evaluation.load_pipeline", None)
    code, _, err = cli("evaluate", "a red circle", "--rewards", "verifier", "--html", "/proc/page.html")
    assert code == 2
    assert err == "t2i-align: html: the folder /proc cannot be written (No such file or directory).\n"


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_numbers_are_printed_before_a_page_fails(cli, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    words = ("evaluate", "a red circle", "--rewards", "tests.test_evaluate:InTheWay", "--images", 1, "--steps", 1)
    code, out, err = cli(*words, "--html", "page.html", *more)
    assert code == 2
    assert "in_the_way" in out
    assert "page.html.tmp: Is a directory" in err


def test_the_command_prints_json(cli, tmp_path):
    code, out, _ = cli("evaluate", "a red circle", "--rewards", "verifier", "--images", 2, "--steps", 2, "--json")
    assert code == 0
    found = json.loads(out, parse_constant=pytest.fail)["verifier"]  # NaN is no JSON
    assert found["prompts"] == 1
    assert found["base"]["low"] is found["gain"]["high"] is None  # one prompt has no interval


def test_what_json_does_not_know_is_null(capsys):
    rows = [{"a": math.nan, "b": (math.inf, 1.5, -math.inf)}, {"c": {"d": [math.nan]}, "e": None, "f": "NaN"}]
    print_json(rows)
    nothing = [{"a": None, "b": [None, 1.5, None]}, {"c": {"d": [None]}, "e": None, "f": "NaN"}]
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == nothing
