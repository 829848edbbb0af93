import json
import math

import pytest
import torch

from t2i_align.calibration import calibrate
from t2i_align.errors import T2IError
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer, Reference, RewardError, Scorer, load_reward
from t2i_align.rewards.mixing import (
    Calibrated,
    LogSigmoid,
    Par,
    Rank,
    ZScore,
    group_index,
    group_rank,
    group_zscore,
)
from t2i_align.rewards.reference import MAD_TO_SD, _hash_scorer, calibration_folder, read_calibration
from t2i_align.rewards.tiny import TinyCLIP

PROMPTS = ["p", "q", "p", "q", "p"]
VALUES = torch.tensor([1.0, 10.0, 3.0, 10.0, 2.0])


def flat(values):
    """Images (B, 3, 2, 2) whose mean is one value each, within [0, 1]."""
    return torch.as_tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2).clone()


def level(scale=1.0, offset=0.0):
    return FunctionScorer(lambda images: scale * images.mean((1, 2, 3)) + offset, "level", differentiable=True)


class Unsure(Scorer):
    """The mean level, with a std of .2."""

    name, differentiable = "unsure", True

    def forward(self, images, prompts):
        value = images.mean((1, 2, 3))
        return value, torch.full_like(value, 0.2)


# within the call


def test_groups_are_numbered_in_order_of_appearance():
    assert group_index(Prompts.of(PROMPTS)).tolist() == [0, 1, 0, 1, 0]


def test_ranks_within_prompts():
    group = group_index(Prompts.of(PROMPTS))
    assert group_rank(VALUES, group).tolist() == [0.0, 0.5, 1.0, 0.5, 0.5]
    assert group_rank(torch.tensor([5.0]), torch.tensor([0])).tolist() == [0.5]
    tied = group_rank(torch.tensor([1.0, 2.0, 2.0, 3.0, 3.0, 3.0]), torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(tied, torch.tensor([0, 1.5, 1.5, 4, 4, 4]) / 5)


def test_ranks_match_counting_and_do_not_change_under_increasing_maps():
    values = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0)).float()
    group = torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(1))
    group[0] = 6  # all seven appear
    same = group[:, None] == group
    below = ((values[:, None] > values) & same).sum(1) + 0.5 * (((values[:, None] == values) & same).sum(1) - 1)
    torch.testing.assert_close(group_rank(values, group), below / (same.sum(1) - 1))
    torch.testing.assert_close(group_rank(values.exp(), group), group_rank(values, group))


def test_nan_has_no_rank_and_does_not_count():
    ranks = group_rank(torch.tensor([2.0, math.nan, 1.0, 3.0]), torch.zeros(4, dtype=torch.long))
    assert ranks[[0, 2, 3]].tolist() == [0.5, 0.0, 1.0]
    assert ranks[1].isnan()
    z, _ = group_zscore(torch.tensor([2.0, math.nan, 1.0, 3.0]), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(z[[0, 2, 3]], torch.tensor([0.0, -1.0, 1.0]) * 1.5**0.5)
    assert z[1].isnan()


def test_z_scores_within_prompts_with_both_ddofs():
    group = group_index(Prompts.of(PROMPTS))
    z, std = group_zscore(VALUES, group)
    torch.testing.assert_close(z, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0]) * 1.5**0.5)
    torch.testing.assert_close(std[0], torch.tensor((2 / 3) ** 0.5))
    torch.testing.assert_close(group_zscore(VALUES, group, ddof=1)[0], torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0]))


def test_equal_values_have_z_score_0_whatever_they_are():
    for value in (0.1, 1e-6, 3.3e5):
        assert group_zscore(torch.full((7,), value), torch.zeros(7, dtype=torch.long))[0].tolist() == [0.0] * 7


def test_group_transforms_do_not_depend_on_the_batch_size():
    images, prompts = flat([0.1, 0.9, 0.3, 0.5, 0.2]), PROMPTS
    for made in (Rank(level()), ZScore(level()), ZScore(level()) + Rank(Unsure())):
        assert made.groupwise
        whole = made.scores(images, prompts).total
        torch.testing.assert_close(made.scores(images, prompts, batch_size=2).total, whole)
        sizes = [image[:, : 1 + row % 2] for row, image in enumerate(images)]
        torch.testing.assert_close(made.scores(sizes, prompts).total, whole)


def test_z_scores_are_differentiable_and_ranks_are_not():
    images = flat([0.1, 0.2, 0.6]).requires_grad_()
    total = ZScore(level()).scores(images, "p").total
    (gradient,) = torch.autograd.grad(total[2], images)
    assert gradient.flatten(1).sum(1)[2] > 0 > gradient.flatten(1).sum(1)[1]
    torch.testing.assert_close(gradient.sum(), torch.tensor(0.0), atol=1e-5, rtol=0)  # a shift of all changes nothing
    with pytest.raises(RewardError, match="not differentiable"):
        Rank(level()).scores(images, "p")


def test_a_z_score_divides_the_std_by_the_spread():
    scores = ZScore(Unsure()).scores(flat([0.2, 0.4]), "p")
    torch.testing.assert_close(scores.std, torch.full((2,), 0.2 / 0.1))
    assert Rank(Unsure()).scores(flat([0.2, 0.4]), "p").std is None


# against the base model

SAMPLES = {"p": [0.1, 0.2, 0.3, 0.4, 0.9], "q": [0.5, 0.5, 0.5, 0.5, 0.5]}


def test_a_reference_knows_its_statistics():
    reference, prompts = Reference(SAMPLES), Prompts.of(["q", "p"])
    sd = math.sqrt((0.28**2 + 0.18**2 + 0.08**2 + 0.02**2 + 0.52**2) / 5)
    assert reference.global_sd == pytest.approx(sd / math.sqrt(2))  # q varies not at all
    assert reference.median(prompts).tolist() == pytest.approx([0.5, 0.3])
    assert reference.mean(prompts).tolist() == pytest.approx([0.5, 0.38])
    assert reference.quantile(prompts, 0.25).tolist() == pytest.approx([0.5, 0.2])
    assert reference.scale(prompts).tolist() == pytest.approx([reference.global_sd / 2, MAD_TO_SD * 0.1])


def test_a_reference_leaves_nan_out_and_takes_uneven_numbers():
    reference = Reference({"p": [1.0, math.nan, 3.0], "q": [5.0]})
    assert reference.mean(Prompts.of(["p", "q"])).tolist() == [2.0, 5.0]
    assert reference.samples(Prompts.of(["q"]))[0].isnan().tolist() == [False, True]
    for bad in ({}, {"p": [math.nan]}):
        with pytest.raises(RewardError, match="to have scores"):
            Reference(bad)
    with pytest.raises(RewardError, match="do not vary"):
        Reference({"p": [1.0, 1.0]}).scale(Prompts.of("p"))


def test_calibration_takes_median_and_scale_away():
    made = Calibrated(Unsure(), Reference(SAMPLES))
    scores = made.scores(flat([0.3, 0.9]), ["p", "p"])
    torch.testing.assert_close(scores.total, torch.tensor([0.0, 0.6 / (MAD_TO_SD * 0.1)]))
    torch.testing.assert_close(scores.std, torch.full((2,), 0.2 / (MAD_TO_SD * 0.1)))
    torch.testing.assert_close(scores.parts["unsure"], torch.tensor([0.3, 0.9]))
    assert not made.groupwise


def test_a_calibrated_score_does_not_depend_on_the_scorers_unit():
    scaled = Reference({prompt: [300 * v - 7 for v in values] for prompt, values in SAMPLES.items()})
    images = flat([0.3, 0.7])
    torch.testing.assert_close(
        Calibrated(level(300.0, -7.0), scaled).scores(images, ["p", "q"]).total,
        Calibrated(level(), Reference(SAMPLES)).scores(images, ["p", "q"]).total,
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_prompt_that_was_not_calibrated_is_refused():
    with pytest.raises(RewardError, match="cannot score 'other': it is not calibrated"):
        Calibrated(level(), Reference(SAMPLES)).scores(flat([0.1]), "other")
    with pytest.raises(RewardError, match="'other' is not calibrated"):
        Calibrated(level(), Reference(SAMPLES))(flat([0.1]), Prompts.of("other"))


def test_log_sigmoid_is_minus_ln_2_at_the_reference_with_half_the_slope():
    images = flat([0.38]).requires_grad_()
    total = LogSigmoid(level(), Reference(SAMPLES), scale=1.0).scores(images, "p").total
    assert total.item() == pytest.approx(-math.log(2))
    assert torch.autograd.grad(total.sum(), images)[0].sum().item() == pytest.approx(0.5)
    quantile = LogSigmoid(level(), Reference(SAMPLES), center=0.75, scale=1.0)
    assert quantile.scores(flat([0.4]), "p").total.item() == pytest.approx(-math.log(2))


def test_a_sum_of_log_sigmoids_is_an_and():
    reference = Reference({"p": [0.0, 1.0]})
    # Both far above: 0, the upper bound. One far below: the other cannot make up for it.
    high = LogSigmoid(level(1e3), reference, scale=1.0)
    low = LogSigmoid(FunctionScorer(lambda images: -1e3 * images.mean((1, 2, 3)), "low"), reference, scale=1.0)
    assert (high + high).scores(flat([1.0]), "p").total.item() == pytest.approx(0.0, abs=1e-30)
    assert (high + low).scores(flat([1.0]), "p").total.item() == pytest.approx(-1000.5)


def test_the_std_of_shaped_scores_follows_the_slope():
    scores = LogSigmoid(Unsure(), Reference(SAMPLES), scale=0.5).scores(flat([0.38]), "p")
    assert scores.std.item() == pytest.approx(0.2 / 0.5 * 0.5)
    scores = Par(Unsure(), Reference({"p": [0.38]}), scale=0.5).scores(flat([0.38]), "p")
    assert scores.std.item() == pytest.approx(0.2 / 0.5 * 0.25)


def test_par_is_shift_invariant_and_equal_references_count_as_one():
    images = flat([0.2, 0.8])
    plain = Par(level(), Reference(SAMPLES)).scores(images, "p").total
    shifted = Reference({prompt: [v + 5 for v in values] for prompt, values in SAMPLES.items()})
    torch.testing.assert_close(Par(level(1.0, 5.0), shifted).scores(images, "p").total, plain)
    one, many = Reference({"p": [0.3]}), Reference({"p": [0.3] * 10})
    torch.testing.assert_close(
        Par(level(), one).scores(images, "p").total, Par(level(), many).scores(images, "p").total
    )
    assert Par(level(), one).scores(flat([0.3]), "p").total.item() == pytest.approx(0.5)
    assert ((plain > 0) & (plain < 1)).all()


def test_par_is_the_mean_win_probability():
    total = Par(level(), Reference(SAMPLES), scale=2.0).scores(flat([0.7]), "p").total.item()
    assert total == pytest.approx(sum(1 / (1 + math.exp(-(0.7 - v) / 2)) for v in SAMPLES["p"]) / 5)


@pytest.mark.parametrize("text", ["calibrated(level)", "log_sigmoid(level)", "par(level, scale=reference)"])
def test_shaped_scores_keep_gradients_and_nan(text):
    kind = {"calibrated": Calibrated, "log_sigmoid": LogSigmoid, "par": Par}[text.partition("(")[0]]
    made = kind(level(), Reference(SAMPLES), **({"scale": "reference"} if kind is Par else {}))
    assert made.name == text
    images = flat([0.2, 0.8]).requires_grad_()
    (gradient,) = torch.autograd.grad(made.scores(images, "p").total.sum(), images)
    assert (gradient > 0).all()
    gap = FunctionScorer(lambda images: torch.full((len(images),), math.nan), "level")
    assert kind(gap, Reference(SAMPLES)).scores(images.detach(), "p").total.isnan().all()


# on disk


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path))
    return tmp_path


FEW = {"particles": 3, "steps": 2, "batch_size": 4}


def test_calibration_is_kept_by_pipeline_scorer_and_prompt(cache):
    scorer = load_reward("jpeg_compressibility")
    with pytest.raises(RewardError, match="rewards calibrate tiny-sd --rewards 'jpeg_compressibility'"):
        load_reward("calibrated(jpeg_compressibility)", base="tiny-sd")
    (reference,) = calibrate("tiny-sd", [scorer], ["a red circle", "a blue star", "a red circle"], **FEW)
    assert set(reference.row) == {"a red circle", "a blue star"}
    assert reference.all_samples.shape == (2, 3)
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")}
    assert len(files) == 2
    # More prompts are added; those that are there stay, and the samples do not depend on the order of calls.
    (more,) = calibrate("tiny-sd", [scorer], ["a green cross", "a blue star"], **FEW)
    assert len(more.row) == 3
    assert all(path.stat().st_mtime_ns == before for path, before in files.items())
    made = load_reward("calibrated(jpeg_compressibility)", base="tiny-sd")
    own = more.all_samples[more.row["a blue star"]]
    expected = (torch.tensor(-2.0) - own.median()) / more.scale(Prompts.of("a blue star"))
    got = made.transform(torch.tensor([-2.0]), None, Prompts.of("a blue star"))[0]
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_samples_of_a_prompt_do_not_depend_on_other_prompts(cache, monkeypatch, tmp_path):
    scorer = load_reward("jpeg_compressibility")
    (both,) = calibrate("tiny-sd", [scorer], ["a red circle", "a blue star"], **FEW)
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path / "other"))
    (alone,) = calibrate("tiny-sd", [scorer], "a blue star", **FEW | {"batch_size": 1})
    own = both.samples(Prompts.of("a blue star"))
    torch.testing.assert_close(alone.all_samples, own, rtol=0.02, atol=0)  # kB of pixels that round differently


def test_other_settings_are_refused_or_replace(cache):
    scorer = load_reward("jpeg_compressibility")
    calibrate("tiny-sd", [scorer], "a red circle", **FEW)
    with pytest.raises(T2IError, match="--overwrite"):
        calibrate("tiny-sd", [scorer], "a blue star", **FEW | {"steps": 1})
    (reference,) = calibrate("tiny-sd", [scorer], "a blue star", **FEW | {"steps": 1}, overwrite=True)
    assert list(reference.row) == ["a blue star"]


def test_the_key_is_the_content(cache):
    class Net(Scorer):
        name = "net"

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

    one, other = Net(), Net()
    assert calibration_folder("tiny-sd", one) == calibration_folder("tiny-sd", other)
    with torch.no_grad():
        other.weight[1] += 1e-6
    assert calibration_folder("tiny-sd", one) != calibration_folder("tiny-sd", other)


def test_other_options_are_another_calibration(cache):
    block = {"options": {"variant": "x100"}}
    (plain,) = calibrate("tiny-sd", [load_reward("tiny_clip")], "a red circle", **FEW)
    with pytest.raises(RewardError, match="'tiny_clip' is not calibrated on tiny-sd: run `t2i_align.calibration"):
        load_reward({"tiny_clip": {**block, "transform": "calibrated"}}, base="tiny-sd")
    (other,) = calibrate("tiny-sd", [load_reward({"tiny_clip": block})], "a red circle", **FEW)
    torch.testing.assert_close(other.means, 100 * plain.means, rtol=1e-4, atol=0)
    for options, mean in ((block, other.means), ({}, plain.means), ({"options": {"variant": "cosine"}}, plain.means)):
        made = load_reward({"tiny_clip": {**options, "transform": "calibrated"}}, base="tiny-sd")
        assert torch.equal(made.reference.means, mean)


def test_calibrations_without_options_stay_valid():
    assert _hash_scorer(load_reward("jpeg_compressibility")) == "f85a0842e621d0c6"  # from before options counted
    usual = load_reward({"tiny_clip": {"options": {"variant": "cosine"}}})
    assert _hash_scorer(load_reward("tiny_clip")) == _hash_scorer(usual) == _hash_scorer(TinyCLIP())


def test_a_damaged_calibration_is_said(cache):
    scorer = load_reward("jpeg_compressibility")
    folder = calibration_folder("tiny-sd", scorer)
    folder.mkdir(parents=True)
    (folder / "x.json").write_text("{")
    with pytest.raises(RewardError, match="damaged"):
        read_calibration("tiny-sd", scorer)


def test_a_scorer_of_sets_cannot_be_calibrated():
    with pytest.raises(T2IError, match="calibrate its members"):
        calibrate("tiny-sd", [load_reward("zscore(jpeg_compressibility)")], "a red circle")


def test_the_command_calibrates(cli, cache):
    words = ("rewards", "calibrate", "tiny-sd", "--rewards", "jpeg_compressibility,mean(verifier, verifier)")
    more = ("--prompts", "a red circle", "--particles", 2, "--steps", 1, "--device", "cpu")
    code, out, _ = cli(*words, *more)
    assert code == 0
    assert "mean(verifier, verifier)" in out
    assert json.loads(next(cache.rglob("*.json")).read_text())["settings"]["particles"] == 2
    reward = load_reward({"jpeg_compressibility": {"at_least": "base"}, "verifier": 1}, base="tiny-sd")
    assert reward.scores(torch.rand(1, 3, 8, 8), "a red circle").parts["jpeg_compressibility.slack"].shape == (1,)


@pytest.mark.parametrize("name", ["verifier", "lcb", "worst(verifier, jpeg_compressibility)", "log_sigmoid"])
def test_the_command_describes(cli, name):
    code, out, _ = cli("rewards", "show", name)
    assert code == 0
    assert name.partition("(")[0] in out
    assert json.loads(cli("rewards", "show", name, "--json")[1])["name"] == name
    assert cli("rewards", "show", "nothing")[0] == 2
