import math

import pytest
import torch

from t2i_align.rewards import Constraint, FunctionScorer, Limited, Reference, RewardError, Scorer, load_reward
from t2i_align.rewards.constraints import Multipliers


def point(function, name):
    """A scorer of f(x), x the mean pixel."""
    return FunctionScorer(lambda images: function(images.mean((1, 2, 3))), name, differentiable=True)


def flat(values):
    return torch.as_tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2).clone()


def ascend_both(reward, x=0.5, updates=1200, rate=0.05):
    """Gradient ascent in x and dual ascent in the multipliers, in turn; returns x."""
    x = torch.tensor([x], requires_grad=True)
    for _ in range(updates):
        scores = reward.scores(x[:, None, None, None].expand(-1, 3, 2, 2))
        (gradient,) = torch.autograd.grad(scores.total.sum(), x)
        with torch.no_grad():
            x += rate * gradient
        reward.update(scores)
    return x.item()


def test_a_quadratic_with_one_constraint_finds_the_kkt_point():
    # max -(x - 1)^2 with x <= .4: x = .4, and 2 (1 - x) = lambda = 1.2
    objective, size = point(lambda x: -(x - 1).square(), "aim"), point(lambda x: x, "size")
    for constraint in (Constraint(size, "at_most", 0.4), Constraint(size, "equals", 0.4)):
        reward = Limited(objective, [constraint])
        assert ascend_both(reward) == pytest.approx(0.4, abs=2e-3)
        sign = -1 if constraint.kind == "equals" else 1  # slack of an equality: value - bound
        assert reward.multipliers().item() == pytest.approx(sign * 1.2, abs=0.02)
    flipped = point(lambda x: -x, "minus_size")
    reward = Limited(objective, [Constraint(flipped, "at_least", -0.4)])
    assert ascend_both(reward) == pytest.approx(0.4, abs=2e-3)


def test_an_inactive_constraint_loses_its_multiplier():
    objective, size = point(lambda x: -(x - 0.3).square(), "aim"), point(lambda x: x, "size")
    reward = Limited(objective, [Constraint(size, "at_most", 0.9)])
    assert ascend_both(reward) == pytest.approx(0.3, abs=2e-3)
    assert reward.multipliers().item() < 1e-3


def test_multipliers_stay_bounded_and_come_back():
    dual = Multipliers(["at_least", "equals"], most=5.0, start=1.0, rate=1.0)
    assert dual().tolist() == pytest.approx([1.0, 0.0])
    for _ in range(100):
        dual.ascend(torch.tensor([-3.0, -3.0]))
    assert dual().tolist() == pytest.approx([5.0, 5.0], abs=1e-3)
    for _ in range(10):
        dual.ascend(torch.tensor([3.0, 3.0]))
    assert dual()[0].item() < 0.01
    assert dual()[1].item() == pytest.approx(-5.0, abs=1e-3)


def test_the_total_is_a_weighted_mean_of_objective_and_slack():
    reward = Limited(
        point(lambda x: 10 * x, "aim"), [Constraint(point(lambda x: x, "size"), "at_least", 0.5)], start=3.0
    )
    scores = reward.scores(flat([0.2, 0.9]))
    torch.testing.assert_close(scores.parts["size.slack"], torch.tensor([-0.3, 0.4]))
    torch.testing.assert_close(scores.total, torch.tensor([(2 - 0.9) / 4, (9 + 1.2) / 4]))
    assert reward.part_names() == ("aim", "size", "size.slack") == tuple(scores.parts)
    assert reward.name == "aim | size at_least 0.5"


def test_a_bound_at_base_is_the_prompts_mean():
    reference = Reference({"p": [0.1, 0.3], "q": [0.8]})
    constraint = Constraint(point(lambda x: x, "size"), "at_least", "base", reference)
    reward = Limited(point(lambda x: x, "aim"), [constraint])
    scores = reward.scores(flat([0.5, 0.5]), ["p", "q"])
    torch.testing.assert_close(scores.parts["size.slack"], torch.tensor([0.3, -0.3]))
    with pytest.raises(RewardError, match="not calibrated"):
        reward.scores(flat([0.5]), "r")


def test_the_state_of_the_multipliers_is_small_and_comes_back():
    def make():
        return Limited(point(lambda x: x, "aim"), [Constraint(point(lambda x: x, "size"), "at_least", 0.5)])

    one, other = make(), make()
    moved = one.update(one.scores(flat([0.1, 0.2])))
    assert moved["size"] > 1.0
    assert list(one.multipliers.state_dict()) == ["raw"]
    other.multipliers.load_state_dict(one.multipliers.state_dict())
    assert other.multipliers().item() == moved["size"]
    assert not list(one.parameters())
    assert "multipliers.raw" in one.state_dict()


class Unsure(Scorer):
    name = "unsure"

    def forward(self, images, prompts):
        value = images.mean((1, 2, 3))
        return value, torch.full_like(value, 2.0)


def test_the_std_is_that_of_the_weighted_sum():
    reward = Limited(Unsure(), [Constraint(point(lambda x: x, "size"), "at_least", 0.5)], start=3.0)
    torch.testing.assert_close(reward.scores(flat([0.1])).std, torch.tensor([0.5]))


@pytest.mark.filterwarnings("ignore:The scorer")
def test_a_nan_masks_its_member_and_does_not_move_the_multiplier():
    gap = FunctionScorer(lambda images: torch.full((len(images),), math.nan), "gap")
    reward = Limited(point(lambda x: x, "aim"), [Constraint(gap, "at_least", 0.5)])
    scores = reward.scores(flat([0.3]))
    assert scores.total.item() == pytest.approx(0.3)
    assert reward.update(scores)["gap"] == pytest.approx(1.0)
    assert Limited(gap, [Constraint(gap, "at_least", 0.5)]).scores(flat([0.3])).total.isnan().all()


def test_constraints_come_from_yaml():
    reward = load_reward({"verifier": 2, "size": {"use": "jpeg_compressibility", "at_least": -5}})
    assert isinstance(reward, Limited)
    scores = reward.scores(torch.rand(2, 3, 8, 8), "a red circle")
    torch.testing.assert_close(scores.parts["size.slack"], scores.parts["size"] + 5)
    assert set(scores.parts) == {"verifier", "size", "size.slack"}


def test_what_is_no_constraint_is_refused():
    scorer = point(lambda x: x, "size")
    for kind, bound in (("above", 1.0), ("at_least", "bsae"), ("at_least", "base")):
        with pytest.raises(RewardError):
            Constraint(scorer, kind, bound)
    with pytest.raises(RewardError, match="one or more constraints"):
        Limited(scorer, [])
    with pytest.raises(RewardError, match="0 < start < most"):
        Limited(scorer, [Constraint(scorer, "at_most", 1.0)], start=20.0)
