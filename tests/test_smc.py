"""Weights and resampling: hand-computed values, limits, offspring bounds."""

import math

import pytest
import torch

from t2i_align.smc import RESAMPLING, Weights, flat_index, systematic


def weights(*log):
    return Weights.uniform(1, len(log)).add(torch.tensor([log]))


def test_equal_weights_have_full_effective_size():
    w = Weights.uniform(2, 5)
    assert w.ess.tolist() == pytest.approx([5, 5])
    assert w.log_normaliser.tolist() == [0, 0]


def test_effective_size_and_normaliser_by_hand():
    w = weights(math.log(3), math.log(1))
    assert float(w.ess) == pytest.approx(16 / 10)
    assert float(w.log_normaliser) == pytest.approx(math.log(2))
    assert w.normalised.exp().tolist()[0] == pytest.approx([0.75, 0.25])


def test_large_log_weights_neither_saturate_nor_overflow():
    w = weights(22_000.0, 22_001.0)
    assert w.normalised.exp().tolist()[0] == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_resampling_is_unbiased(scheme):
    share = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    uniforms = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))
    index = RESAMPLING[scheme](share.expand(40_000, 4), uniforms)
    counts = torch.stack([(index == k).double().sum(1).mean() for k in range(4)])
    bound = 4 * math.sqrt(1.0 / 40_000)  # a count's standard deviation is below 1
    assert (counts - 4 * share[0]).abs().max() < bound


def test_systematic_offspring_are_within_one_of_their_expectation():
    g = torch.Generator().manual_seed(1)
    share = torch.rand(500, 7, generator=g).softmax(1).double()
    index = systematic(share, torch.rand(500, 7, generator=g))
    counts = torch.stack([(index == k).sum(1) for k in range(7)], 1)
    assert (counts >= (7 * share).floor()).all()
    assert (counts <= (7 * share).ceil()).all()
    assert sorted(systematic(torch.tensor([[0.5, 0.5, 0, 0]]), torch.tensor([[0.3, 0, 0, 0]]))[0].tolist()) == [
        0,
        0,
        1,
        1,
    ]


@pytest.mark.parametrize("scheme", RESAMPLING)
def test_a_particle_without_weight_has_no_offspring(scheme):
    share = torch.tensor([[0.3, 0.7, 0.0]])
    for u in (0.0, 0.5, 1 - 1e-7):
        assert 2 not in RESAMPLING[scheme](share, torch.full((1, 3), u))


def test_a_skipped_resampling_carries_the_weights():
    w = weights(0.1, 0.0)
    index, after = w.resample(0.5, torch.rand(1, 2))
    assert index.tolist() == [[0, 1]]
    assert torch.equal(after.log, w.log)
    assert float(after.log_z) == 0


def test_a_resampling_resets_the_weights_and_keeps_the_normaliser():
    w = weights(5.0, 0.0, 0.0, 0.0)
    index, after = w.resample(0.5, torch.full((1, 4), 0.5))
    assert index.tolist()[0].count(0) == 4
    assert not after.log.any()
    assert float(after.log_normaliser) == pytest.approx(float(w.log_normaliser))


def test_groups_are_resampled_apart():
    w = Weights.uniform(2, 2).add(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    index, _ = w.resample(1.0, torch.full((2, 2), 0.5))
    assert index.tolist() == [[0, 1], [0, 0]]
    assert flat_index(index).tolist() == [0, 1, 2, 2]


def test_rewards_that_are_no_numbers_weigh_nothing():
    w = weights(math.nan, 0.0, math.inf)
    assert w.normalised.exp()[0].tolist() == [0, 1, 0]
    dead = weights(math.nan, math.nan)
    assert not dead.alive.any()
    index, after = dead.resample(1.0, torch.rand(1, 2))
    assert index.tolist() == [[0, 1]]
    assert not after.alive.any()
