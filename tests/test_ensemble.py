import copy
import math

import pytest
import torch
from torch import nn

from t2i_align.rewards import SCORERS, FunctionScorer, RewardError, Scorer, load_reward, scorer_class
from t2i_align.rewards.ensemble import (
    LowerBound,
    Mean,
    Robust,
    SoftMin,
    VariancePenalty,
    Worst,
    average_weights,
    disagreement,
    soft_min,
)
from t2i_align.rewards.uncertainty import (
    Consistent,
    HeadScorer,
    QuantileHead,
    discount,
    nudge,
    pinball,
    quantiles_to_mean_std,
)

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def level(value, name=None, scale=0.0):
    """A scorer of `value + scale * mean pixel`."""
    return FunctionScorer(lambda images: value + scale * images.mean((1, 2, 3)), name or f"s{value}", True)


class Unsure(Scorer):
    differentiable = True

    def __init__(self, mean, std, name):
        super().__init__()
        self.values, self.name = (mean, std), name

    def forward(self, images, prompts):
        zeros = 0 * images.mean((1, 2, 3))
        return zeros + self.values[0], zeros + self.values[1]


FIVE = [level(float(value)) for value in range(1, 6)]


def total(scorer):
    return scorer.scores(IMAGES).total[0].item()


# objectives


def test_objectives_of_one_to_five():
    assert total(Mean(*FIVE)) == 3.0
    assert total(Worst(*FIVE)) == 1.0
    assert total(VariancePenalty(*FIVE, weight=1.0)) == pytest.approx(3 - 2.0)  # ddof 0
    assert total(VariancePenalty(*FIVE, weight=1.0, ddof=1)) == pytest.approx(3 - 2.5)
    assert total(LowerBound(*FIVE, k=0.5)) == pytest.approx(3 - 0.5 * math.sqrt(2))
    assert total(Robust(*FIVE, nominal=1.0)) == 3.0
    assert total(Robust(*FIVE, nominal=0.0)) == 1.0
    assert total(Robust(*FIVE, nominal=0.25)) == 0.25 * 3 + 0.75


def test_no_penalty_is_the_mean_and_equal_members_agree():
    assert total(VariancePenalty(*FIVE, weight=0.0)) == total(LowerBound(*FIVE, k=0.0)) == 3.0
    same = [level(2.0, name) for name in "abc"]
    kinds = (Mean, Worst, VariancePenalty, LowerBound, Robust, SoftMin)
    assert [total(kind(*same)) for kind in kinds] == pytest.approx([2.0] * 6)


@pytest.mark.parametrize("kind", [Mean, Worst, VariancePenalty, LowerBound, Robust, SoftMin])
def test_a_constant_on_all_members_shifts_every_objective(kind):
    shifted = [level(value + 10.0) for value in range(1, 6)]
    assert total(kind(*shifted)) == pytest.approx(total(kind(*FIVE)) + 10, abs=1e-5)


@pytest.mark.parametrize(("b", "value"), [(5.0, 0.975), (1.0, 0.875), (0.3, 0.583)])
def test_the_soft_minimum_of_gaussian_members(b, value):
    quantiles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    members = 1 + 0.5 * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    assert soft_min(members, b).item() == pytest.approx(1 - 0.25 / (2 * b), abs=2e-3)
    assert soft_min(members, b).item() == pytest.approx(value, abs=2e-3)


def test_the_soft_minimum_has_its_limits():
    values = torch.tensor([[1.0, math.nan], [4.0, 2.0]])
    assert soft_min(values, 0.0).tolist() == [1.0, 2.0]
    assert soft_min(values, math.inf).tolist() == [2.5, 2.0]
    torch.testing.assert_close(soft_min(values, 1e-4), torch.tensor([1.0, 2.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(soft_min(values, 1e4), torch.tensor([2.5, 2.0]), rtol=0, atol=1e-3)
    assert soft_min(torch.full((2, 1), math.nan), 1.0).isnan().all()


def test_the_soft_minimum_at_infinity_is_the_mean():
    said = load_reward("soft_min(verifier, jpeg_compressibility, b=inf)")
    mean = load_reward("mean(verifier, jpeg_compressibility)")
    assert said.name == "soft_min(verifier, jpeg_compressibility, b=inf)"
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(said.scores(images, "a red circle").total, mean.scores(images, "a red circle").total)
    unsure = [FunctionScorer(lambda images: torch.ones(len(images)), "sure"), load_reward("tiny_pick")]
    scores = SoftMin(*unsure, b=math.inf).scores(images, "a red circle")
    torch.testing.assert_close(scores.std, unsure[1].scores(images, "a red circle").std / 2)


@pytest.mark.parametrize("kind", [Mean, Worst, VariancePenalty, LowerBound, Robust, SoftMin])
def test_a_nan_masks_its_member_for_its_row(kind):
    gap = FunctionScorer(lambda images: torch.tensor([math.nan, 5.0]), "gap")
    gone = FunctionScorer(lambda images: torch.tensor([math.nan, 7.0]), "gone")
    with pytest.warns(RuntimeWarning, match="'gap' gave no number"):
        first = kind(level(1.0), level(2.0), gap).scores(IMAGES)
    assert first.total[0].item() == pytest.approx(total(kind(level(1.0), level(2.0))))
    assert first.parts["gap"][0].isnan()
    with pytest.warns(RuntimeWarning):
        assert kind(gap, gone).scores(IMAGES).total.isnan().tolist() == [True, False]


# the std


def test_the_std_is_the_law_of_total_variance():
    scores = Mean(Unsure(1.0, 3.0, "a"), Unsure(5.0, 4.0, "b")).scores(IMAGES)
    assert scores.std[0].item() == pytest.approx(math.sqrt(2**2 + (9 + 16) / 2))
    assert Mean(Unsure(1.0, 3.0, "a"), level(5.0)).scores(IMAGES).std[0].item() == pytest.approx(math.sqrt(4 + 4.5))


def test_a_lower_bound_takes_the_scorers_own_std_and_keeps_it():
    scores = LowerBound(Unsure(1.0, 3.0, "a"), k=2).scores(IMAGES)
    assert (scores.total[0].item(), scores.std[0].item()) == (-5.0, 3.0)


class Silent(Scorer):
    """Does not say whether it has a std, and has none."""

    name = "silent"

    def forward(self, images, prompts):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("kind", [LowerBound, VariancePenalty])
def test_a_penalty_without_a_std_is_refused_before_an_image_is_read_where_that_is_known(kind):
    for scorer in (level(1.0), 2 * level(1.0) + level(2.0), SoftMin(level(1.0), level(2.0))):
        with pytest.raises(RewardError, match="needs a std"):
            kind(scorer)
    for word in ("lcb(verifier, k=1)", "uwo(clamp(jpeg_compressibility))"):
        with pytest.raises(RewardError, match="needs a std"):
            load_reward(word)
    with pytest.raises(RewardError, match="needs a std"):
        kind(Silent()).scores(IMAGES)
    for scorer in (Consistent(level(1.0)), level(1.0) + Unsure(1.0, 3.0, "a"), Mean(level(1.0), level(2.0))):
        assert kind(scorer).scores(IMAGES).std is not None


def test_the_scorers_of_the_table_say_whether_they_have_a_std():
    for name in SCORERS:
        found = scorer_class(name)
        assert found.without_std == (found.forward.__annotations__["return"] == "Tensor"), name


def test_the_std_flows_through_sums_and_objectives():
    made = 2 * LowerBound(Unsure(1.0, 3.0, "a")) - 0.5 * Mean(level(1.0), level(3.0)) + level(7.0)
    scores = made.scores(IMAGES)
    assert scores.total[0].item() == pytest.approx(2 * -2 - 0.5 * 2 + 7)
    assert scores.std[0].item() == pytest.approx(math.hypot(2 * 3, 0.5 * 1))


def test_the_std_of_a_soft_minimum_is_weighted_by_its_gradient():
    made = SoftMin(Unsure(0.0, 1.0, "a"), Unsure(1.0, 2.0, "b"), b=1.0)
    share = 1 / (1 + math.exp(-1))
    assert made.scores(IMAGES).std[0].item() == pytest.approx(math.hypot(share, 2 * (1 - share)))
    assert SoftMin(Unsure(0.0, 1.0, "a"), Unsure(1.0, 2.0, "b"), b=0.0).scores(IMAGES).std[0].item() == 1.0
    assert SoftMin(level(0.0), level(1.0)).scores(IMAGES).std is None


@pytest.mark.parametrize("kind", [Mean, Worst, VariancePenalty, LowerBound, Robust, SoftMin])
def test_objectives_are_differentiable(kind):
    images = IMAGES.clone().requires_grad_()
    made = kind(
        level(1.0, scale=2.0), level(1.0, "equal", scale=2.0)
    )  # no disagreement: the std's slope is not infinite
    assert made.differentiable
    (gradient,) = torch.autograd.grad(made.scores(images).total.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 2 / images[0].numel()))
    assert not kind(level(1.0), FunctionScorer(lambda images: images.mean((1, 2, 3)), "plain")).differentiable


def test_disagreement_needs_two():
    assert disagreement(torch.tensor([[1.0, 2.0], [math.nan, 4.0]])).tolist() == [0.0, 1.0]
    assert disagreement(torch.tensor([[1.0], [3.0]]), ddof=1).item() == pytest.approx(math.sqrt(2))


# weight averaging


def test_averaging_affine_heads_is_averaging_predictions():
    torch.manual_seed(0)
    heads = [nn.Linear(6, 1) for _ in range(3)]
    features = torch.randn(10, 6)
    expected = torch.stack([head(features) for head in heads]).mean(0)
    torch.testing.assert_close(average_weights(heads)(features), expected)
    weighted = 0.5 * heads[0](features) + 0.5 * heads[2](features)
    torch.testing.assert_close(average_weights(heads, [0.5, 0.0, 0.5])(features), weighted)


def test_averaging_deep_heads_is_not():
    torch.manual_seed(0)
    heads = [nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)) for _ in range(2)]
    features = torch.randn(10, 6)
    expected = torch.stack([head(features) for head in heads]).mean(0)
    assert (average_weights(heads)(features) - expected).abs().max() > 0.01
    # ... unless both affine layers are first collapsed into one.
    flat = [nn.Linear(6, 1) for _ in heads]
    with torch.no_grad():
        for one, (first, second) in zip(flat, heads, strict=True):
            one.weight.copy_(second.weight @ first.weight)
            one.bias.copy_(second.weight @ first.bias + second.bias)
    torch.testing.assert_close(average_weights(flat)(features), expected)


def test_what_cannot_be_averaged_is_refused():
    head = nn.Linear(2, 1)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(RewardError, match="differ in 'weight'"):
        average_weights([head, nn.Linear(3, 1)])
    with pytest.raises(RewardError, match="differ in 'bias'"):
        average_weights([head, nn.Linear(2, 1, bias=False)])
    with pytest.raises(RewardError, match="sum to 1"):
        average_weights([head, head], [1.0, 1.0])
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    other.num_batches_tracked += 1
    with pytest.raises(RewardError, match="num_batches_tracked"):
        average_weights([one, other])
    average_weights([head, nn.Linear(2, 1)])
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


# consistency under augmentations


def brightness(name="brightness"):
    return FunctionScorer(lambda images: images.mean((1, 2, 3)), name, differentiable=True)


def test_consistency_is_the_spread_over_views():
    scores = Consistent(brightness(), views=3).scores(IMAGES)
    from t2i_align.keys import generator

    views = [nudge(IMAGES, generator(0, "augment", view)).mean((1, 2, 3)) for view in range(3)]
    values = torch.stack([IMAGES.mean((1, 2, 3)), *views])
    torch.testing.assert_close(scores.total, values[0])
    torch.testing.assert_close(scores.std, values.std(0, correction=0))
    assert (scores.std > 0).all()


def test_a_scorer_that_augmentations_do_not_touch_has_std_0():
    still = Consistent(brightness(), augment=lambda images, draws: images)
    assert still.scores(IMAGES).std.tolist() == [0.0, 0.0]
    assert Consistent(level(3.0), views=1).scores(IMAGES).std.tolist() == [0.0, 0.0]


def test_consistency_does_not_depend_on_batch_mates_and_is_keyed():
    made = Consistent(brightness(), seed=1)
    whole = made.scores(IMAGES).std
    torch.testing.assert_close(made.scores(IMAGES, batch_size=1).std, whole)
    torch.testing.assert_close(made.scores(IMAGES.flip(0)).std.flip(0), whole)
    assert not torch.equal(Consistent(brightness(), seed=2).scores(IMAGES).std, whole)


def test_consistency_is_differentiable_and_shares_the_plain_score():
    seen = []

    def look(images):
        seen.append(images)
        return images.square().mean((1, 2, 3))

    leaf = FunctionScorer(look, "leaf", differentiable=True)
    images = IMAGES.clone().requires_grad_()
    scores = LowerBound(Consistent(leaf, views=2) + 0.5 * leaf).scores(images)
    assert len(seen) == 3  # once plain for both, and two views
    (gradient,) = torch.autograd.grad(scores.total.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_views_show_the_same():
    from t2i_align.data.images import pil_to_tensor
    from t2i_align.keys import generator
    from t2i_align.playground.world import sample_scenes

    scenes = list(sample_scenes(30, seed=5))
    images = torch.stack([pil_to_tensor(scene.render()) for scene in scenes])
    verifier = load_reward("verifier")
    for view in range(4):
        changed = nudge(images, generator(0, "augment", view))
        assert changed.aminmax().min >= 0
        assert changed.aminmax().max <= 1
        assert verifier.scores(changed, [str(scene.caption) for scene in scenes]).total.mean() > 0.97


def test_consistency_of_sets_is_refused():
    with pytest.raises(RewardError, match="of single images"):
        load_reward("consistent(rank(jpeg_compressibility))")
    with pytest.raises(RewardError, match="1 or more views"):
        load_reward("consistent(jpeg_compressibility, views=0)")
    assert load_reward("lcb(consistent(jpeg_compressibility), k=2)").scores(IMAGES).std is not None


def test_discounted_losses():
    two = torch.tensor(2.0)
    assert discount(two, torch.tensor(0.5)).item() == pytest.approx(1.713061, abs=1e-6)
    assert discount(two, torch.tensor(0.1)).item() == pytest.approx(1.909675, abs=1e-6)
    grid = torch.linspace(0, 3, 30001)
    best = discount(two, grid).argmin()
    assert grid[best].item() == pytest.approx(math.log(2), abs=1e-3)
    assert discount(two, grid)[best].item() == pytest.approx(1 + math.log(2))
    assert discount(torch.tensor(0.8), grid).argmin() == 0
    torch.testing.assert_close(discount(two, torch.tensor(0.0)), two)


# quantile heads and heads with a std


def test_the_minimiser_of_the_pinball_loss_is_the_empirical_quantile():
    samples = torch.randn(401, generator=torch.Generator().manual_seed(0)).double()
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    quantiles = samples.quantile(levels)
    at_best = pinball(quantiles.expand(401, 3), samples, levels)
    for shift in (-0.01, 0.01):
        assert pinball((quantiles + shift).expand(401, 3), samples, levels) > at_best


def test_quantiles_never_cross():
    head = QuantileHead(4)
    with torch.no_grad():
        head.linear.weight.mul_(30)
    quantiles = head(torch.randn(50, 4, generator=torch.Generator().manual_seed(1)))
    assert quantiles.shape == (50, 5)
    assert (quantiles.diff(dim=1) >= 0).all()
    for levels in ((0.5, 0.1), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(RewardError, match="increasing quantile levels"):
            QuantileHead(4, levels)


def test_gaussian_quantiles_give_their_mean_and_std():
    levels = torch.tensor([0.05, 0.3, 0.5, 0.8], dtype=torch.float64)
    normal = torch.distributions.Normal(2.0, 3.0)
    mean, std = quantiles_to_mean_std(normal.icdf(levels)[None], levels)
    assert (mean.item(), std.item()) == pytest.approx((2.0, 3.0))


class Pair(nn.Module):
    def forward(self, features):
        return features.sum(1, keepdim=True), features[:, :1].abs()


@pytest.mark.parametrize("head", [nn.Linear(12, 1), Pair(), QuantileHead(12)], ids=["mean", "mean_std", "quantiles"])
def test_heads_on_features_are_scorers(head):
    made = HeadScorer("head", lambda images: images[:, :, :2, :2].flatten(1), head)
    scores = made.scores(IMAGES)
    assert scores.total.shape == (2,)
    assert (scores.std is None) == isinstance(head, nn.Linear)
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(made.scores(images).total.sum(), images)
    assert gradient.abs().sum() > 0
    if scores.std is not None:
        torch.testing.assert_close(LowerBound(made, k=2).scores(IMAGES).total, scores.total - 2 * scores.std)
