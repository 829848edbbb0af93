"""Advantages, pairs and trackers by hand."""

import math

import diffusers
import pytest
import torch

from t2i_align.advantage import PromptTracker, gains_by_step, gdpo_advantage, group_advantage, unequal_pairs
from t2i_align.methods.expansion import expansion_advantage
from t2i_align.methods.rwr import best_of, tilted
from t2i_align.pipelines.grid import read_grid
from t2i_align.smc import Weights

NAN = math.nan


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    population = group_advantage(rewards, 4, eps=0.0)
    assert population.tolist() == pytest.approx([-1.341641, -0.447214, 0.447214, 1.341641], abs=1e-6)
    sample = group_advantage(rewards, 4, ddof=1, eps=0.0)
    assert sample.tolist() == pytest.approx([-1.161895, -0.387298, 0.387298, 1.161895], abs=1e-6)


def test_groups_have_their_own_mean_and_the_batch_one_std():
    rewards = torch.tensor([0.0, 2.0, 10.0, 18.0])
    assert group_advantage(rewards, 2, eps=0.0).tolist() == pytest.approx([-1, 1, -1, 1])
    std = rewards.std(correction=0).item()
    assert group_advantage(rewards, 2, "global", eps=0.0).tolist() == pytest.approx([v / std for v in (-1, 1, -4, 4)])
    assert group_advantage(rewards, 2, "none", clip=None).tolist() == [-1, 1, -4, 4]


def test_equal_and_missing_rewards_move_nothing():
    assert not group_advantage(torch.ones(6), 3).any()
    assert not group_advantage(torch.ones(3), 1).any()
    advantage = group_advantage(torch.tensor([1.0, NAN, 3.0]), 3, eps=0.0)
    assert advantage.tolist() == pytest.approx([-1, 0, 1])
    assert not group_advantage(torch.tensor([NAN, NAN]), 2).any()


def test_advantages_are_clamped():
    rewards = torch.zeros(100)
    rewards[0] = 1.0
    assert group_advantage(rewards, 100).max() == 5.0
    assert group_advantage(rewards, 100, clip=None).max() > 9


def test_gdpo_gives_every_reward_the_same_say():
    big, small = torch.tensor([0.0, 100.0, 0.0, 100.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    advantage = gdpo_advantage({"big": big, "small": small}, {"big": 1.0, "small": 1.0}, 4)
    assert advantage[1] == pytest.approx(float(advantage[2]), abs=1e-2)
    assert advantage[3] > 0 > advantage[0]


def test_gains_of_steps_by_hand():
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0])
    # Before step 0 nothing is known; before step 1 all of it, in another unit and around another mean.
    previews = torch.tensor([[5.0, 6.0], [5.0, 2.0], [7.0, 18.0], [7.0, 10.0]])
    for decay in (0.0, 0.5, 1.0):  # V = 0, advantage, advantage: all is gained by step 0
        made = gains_by_step(advantage, previews, 2, decay)
        assert torch.allclose(made, advantage[:, None] * torch.tensor([1.0, 0.0]))
    # Step 0 decides the first prompt, step 1 the second: V_1 = 1, -1, 0, 0.
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    previews = torch.tensor([[5.0, 3.0], [5.0, 1.0], [7.0, 5.0], [7.0, 5.0]])
    for decay in (0.0, 0.5, 1.0):
        by_hand = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [decay, 1.0], [-decay, -1.0]])
        torch.testing.assert_close(gains_by_step(advantage, previews, 2, decay), by_hand)


def test_gains_of_steps_add_up_to_the_advantage():
    draws = torch.Generator().manual_seed(0)
    advantage = group_advantage(torch.randn(12, generator=draws), 4)
    previews = torch.randn(12, 3, generator=draws)
    previews[3, 1] = NAN
    own, all_after = (gains_by_step(advantage, previews, 4, decay) for decay in (0.0, 1.0))
    torch.testing.assert_close(own.flip(1).cumsum(1).flip(1), all_after)
    flat = torch.ones(12, 3)
    torch.testing.assert_close(gains_by_step(advantage, flat, 4, 1.0), advantage[:, None].expand(-1, 3))
    assert all_after.var() < advantage.var()  # what was known before a step is no credit of its own
    misleading = gains_by_step(advantage, -advantage[:, None].expand(-1, 3), 4, 1.0)
    torch.testing.assert_close(misleading, advantage[:, None].expand(-1, 3))


def test_a_prompts_own_statistics_are_used_once_there_are_enough():
    tracker = PromptTracker(size=4, min_count=2)
    first = tracker.advantage(["a", "b"], torch.tensor([0.0, 10.0]), eps=0.0)
    assert first.tolist() == pytest.approx([-1, 1])  # of the batch
    second = tracker.advantage(["a", "b"], torch.tensor([2.0, 30.0]), eps=0.0)
    assert second.tolist() == pytest.approx([1, 1])  # a: 0, 2; b: 10, 30
    again = PromptTracker(size=4, min_count=2)
    again.load_state_dict(tracker.state_dict())
    third = [t.advantage(["a"], torch.tensor([4.0])) for t in (tracker, again)]
    assert torch.equal(*third)


def test_pairs_hold_unequal_rewards_of_one_prompt():
    rewards = torch.tensor([1.0, 3.0, 3.0, 0.0, NAN, 2.0])
    assert unequal_pairs(rewards, 3).tolist() == [[1, 0], [2, 0], [5, 3]]
    assert unequal_pairs(rewards, 3, extremes=True).tolist() == [[1, 0], [5, 3]]
    assert unequal_pairs(torch.ones(4), 2, extremes=True).shape == (0, 2)


class OnMac(torch.Tensor):
    """As if of an Apple GPU, which has no float64."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")


FLOW = diffusers.FlowMatchEulerDiscreteScheduler()  # keeps its sigmas on the device


def levels(sigmas):
    FLOW.set_timesteps(8)
    FLOW.sigmas = sigmas
    return read_grid(FLOW).sigma


ON_A_DEVICE = {
    "group": lambda rewards: group_advantage(rewards, 4),
    "gdpo": lambda rewards: gdpo_advantage({"a": rewards, "b": rewards.square()}, {"a": 1.0, "b": 2.0}, 4),
    "gains": lambda rewards: gains_by_step(rewards, torch.stack([rewards, 2 * rewards], 1), 4, 0.5),
    "tracker": lambda rewards: PromptTracker(min_count=2).advantage(["p", "q"] * 4, rewards),
    "pairs": lambda rewards: unequal_pairs(rewards, 4),
    "extremes": lambda rewards: unequal_pairs(rewards, 4, extremes=True),
    "tilted": lambda rewards: tilted(rewards.reshape(2, 4), 0.5),
    "best_of": lambda rewards: best_of(rewards.reshape(2, 4), 2),
    "expansion": lambda rewards: expansion_advantage(rewards, torch.arange(8) % 2, 5.0),
    "weights": lambda rewards: Weights.uniform(2, 4).add(rewards.reshape(2, 4)).log,
    "grid": lambda rewards: levels(torch.cat([rewards.sort(descending=True).values, 0 * rewards[:1]])),
}


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_a_device_without_float64_has_the_same_numbers(name):
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(0))
    function = ON_A_DEVICE[name]
    assert torch.equal(function(rewards.as_subclass(OnMac)).as_subclass(torch.Tensor), function(rewards))
