import math

import pytest
import torch

from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer, RewardError, load_reward
from t2i_align.rewards.pareto import (
    Pareto,
    crowding_distance,
    dominance,
    expected_front,
    fronts,
    hypervolume_2d,
    non_dominated,
    parrot_rewards,
    select,
)

NAN, INF = math.nan, math.inf
PARROT = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0], [2.0, 2.0]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_all_but_the_dominated_survive_with_both_copies_of_a_tie():
    assert non_dominated(PARROT).tolist() == [True, True, True, False, True]
    assert dominance(PARROT).nonzero().tolist() == [[0, 3], [1, 3], [2, 3], [4, 3]]


def test_with_one_reward_only_the_maxima_survive():
    values = torch.tensor([[1.0], [3.0], [2.0], [3.0]])
    assert non_dominated(values).tolist() == [False, True, False, True]
    torch.testing.assert_close(parrot_rewards(values)[:, 0], torch.tensor([0.0, 1.5, 0.0, 1.5]))


def test_dominance_does_not_change_under_increasing_maps():
    values = normal(60, 3)
    assert torch.equal(dominance(values.exp()), dominance(values))
    scaled = torch.stack([values[:, 0] * 100, values[:, 1].sigmoid(), values[:, 2] ** 3], 1)
    assert torch.equal(fronts(scaled), fronts(values))


def slow_fronts(values):
    left, front, number = set(range(len(values))), [0] * len(values), 0
    while left:
        now = {
            b
            for b in left
            if not any((values[a] >= values[b]).all() and (values[a] > values[b]).any() for a in left if a != b)
        }
        for row in now:
            front[row] = number
        left, number = left - now, number + 1
    return front


@pytest.mark.parametrize("rewards", [1, 2, 3, 5])
def test_fronts_match_the_definition(rewards):
    values = normal(40, rewards).mul(2).round()  # with ties
    assert fronts(values).tolist() == slow_fronts(values)
    assert torch.equal(fronts(values) == 0, non_dominated(values))


def test_rows_with_nan_lie_behind_all_others():
    values = torch.cat([PARROT, torch.tensor([[NAN, 9.0], [NAN, NAN]])])
    assert non_dominated(values).tolist() == [True, True, True, False, True, False, False]
    assert fronts(values).tolist() == [0, 0, 0, 1, 0, 2, 2]
    assert not non_dominated(torch.full((2, 2), NAN)).any()
    assert select(values, 5).sort().values.tolist() == [0, 1, 2, 3, 4]


def test_infinite_values_are_compared_like_others():
    values = torch.tensor([[INF, 0.0], [0.0, INF], [-INF, -INF]])
    assert fronts(values).tolist() == [0, 0, 1]


@pytest.mark.parametrize(("n", "rewards", "size"), [(4, 2, 25 / 12), (256, 4, 43.7), (16, 4, 9.5), (9, 1, 1.0)])
def test_expected_sizes_of_the_front(n, rewards, size):
    assert expected_front(n, rewards) == pytest.approx(size, abs=0.05 if size > 9 else 1e-12)
    draws = 4000 if n < 100 else 60
    sizes = torch.stack([non_dominated(normal(n, rewards, seed=draw)).sum() for draw in range(draws)]).double()
    assert abs(sizes.mean().item() - size) < 4 * max(sizes.std().item(), 1e-9) / math.sqrt(draws) + 0.05 * (size > 9)


def test_crowding_distances_by_hand():
    values = torch.tensor([[0.0, 10.0], [1.0, 6.0], [3.0, 4.0], [10.0, 0.0]])
    torch.testing.assert_close(crowding_distance(values), torch.tensor([INF, 0.3 + 0.6, 0.9 + 0.6, INF]))
    assert crowding_distance(torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])).tolist() == [0.0, 0.0, 0.0]
    assert crowding_distance(torch.tensor([[1.0, 2.0]])).tolist() == [INF]
    assert crowding_distance(torch.cat([values, values - 20]))[4:].tolist() == crowding_distance(values).tolist()


def test_selection_takes_fronts_then_the_least_crowded():
    values = torch.tensor([[0.0, 10.0], [1.0, 6.0], [3.0, 4.0], [10.0, 0.0], [0.5, 0.5]])
    assert set(select(values, 3).tolist()) == {0, 3, 2}
    assert set(select(values, 4).tolist()) == {0, 1, 2, 3}
    assert select(values, 5)[-1] == 4
    for n in (0, 6):
        with pytest.raises(RewardError, match="select 1 to 5"):
            select(values, n)


def test_hypervolumes_by_hand_and_by_counting():
    corner = torch.zeros(2)
    assert hypervolume_2d(PARROT, corner).item() == 1 * 3 + 1 * 2 + 1 * 1
    assert hypervolume_2d(PARROT[3:4], corner).item() == 1.0
    assert hypervolume_2d(PARROT, torch.tensor([5.0, 0.0])).item() == 0.0
    values = torch.rand(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axis = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    reached = torch.zeros(2000, 2000, dtype=torch.bool)
    for x, y in values:
        reached |= (axis[:, None] < x) & (axis < y)
    volume = hypervolume_2d(values, torch.zeros(2, dtype=torch.float64))
    assert volume.item() == pytest.approx(reached.double().mean().item(), abs=2e-3)
    torch.testing.assert_close(hypervolume_2d(values[non_dominated(values)], corner.double()), volume)
    with pytest.raises(RewardError, match=r"values \(N, 2\)"):
        hypervolume_2d(torch.zeros(3, 3), torch.zeros(3))


def test_parrots_rewards_skip_the_dominated():
    rewards = parrot_rewards(PARROT)
    torch.testing.assert_close(rewards, PARROT * torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])[:, None] / 4)


def test_parrot_selects_within_each_prompt_and_may_standardise():
    prompts = Prompts.of(["p", "q", "p", "q"])
    values = torch.tensor([[1.0, 1.0], [5.0, 5.0], [2.0, 2.0], [6.0, 4.0]])
    rewards = parrot_rewards(values, prompts)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 0.0], [2.5, 2.5], [2.0, 2.0], [3.0, 2.0]]))
    standard = parrot_rewards(values, prompts, standardise=True)
    torch.testing.assert_close(standard, torch.tensor([[0.0, 0.0], [-0.5, 0.5], [1.0, 1.0], [0.5, -0.5]]))


def pixel(channel, name, sign=1.0):
    return FunctionScorer(lambda images: sign * images[:, channel].mean((1, 2)), name)


def test_pareto_is_a_reward_that_no_scale_changes():
    images = torch.rand(12, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    prompts = ["p", "q"] * 6
    made = Pareto(pixel(0, "a"), pixel(1, "b"), pixel(2, "c"))
    assert made.groupwise
    scores = made.scores(images, prompts)
    assert set(scores.parts) == {"a", "b", "c"}
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        front = fronts(torch.stack([scores.parts[name][rows] for name in "abc"], 1))
        assert torch.equal((-scores.total[rows]).ceil().clamp(min=0).long(), front)
    scaled = Pareto(pixel(0, "a", 100.0), pixel(1, "b"), pixel(2, "c", 0.01))
    torch.testing.assert_close(scaled.scores(images, prompts, batch_size=5).total, scores.total, rtol=1e-4, atol=1e-4)


def test_pareto_in_a_text_and_nan():
    made = load_reward("pareto(verifier, jpeg_compressibility)")
    assert made.scores(torch.rand(3, 3, 8, 8), "a red circle").total.shape == (3,)
    gap = FunctionScorer(lambda images: torch.tensor([1.0, NAN]), "gap")
    assert Pareto(pixel(0, "a"), gap).scores(torch.rand(2, 3, 2, 2), "p").total.isnan().tolist() == [False, True]
    with pytest.raises(RewardError, match="2 or more"):
        Pareto(pixel(0, "a"))


def test_thousands_of_rows_are_no_python_loop():
    assert abs(int(non_dominated(normal(4000, 3)).sum()) - expected_front(4000, 3)) < 40
