"""Losses of a scorer's training against values worked out by hand, and their gradients in the limits."""

import math

import pytest
import torch

from t2i_align.scorer_training.losses import bradley_terry, compare, plackett_luce

NAN = float("nan")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loss_of(scores, merits, **options):
    scores = torch.tensor([scores], requires_grad=True)
    labels, counted = compare(torch.tensor([merits]))
    loss, count = bradley_terry(scores, labels, counted, **options)
    loss.sum().backward()
    return loss.item(), int(count), scores.grad[0].tolist()


def test_labels_say_who_is_better_and_leave_absent_pictures_out():
    labels, counted = compare(torch.tensor([[1.0, 0.5, 0.5], [2.0, 3.0, NAN]]))
    assert labels[0].tolist() == [[0, 1, 1], [-1, 0, 0], [-1, 0, 0]]
    assert labels[1].tolist() == [[0, -1, 0], [1, 0, 0], [0, 0, 0]]
    assert counted.sum((1, 2)).tolist() == [3, 1]


def test_a_tie_as_half_a_win_each_is_a_divergence():
    value, count, _ = loss_of([1.0, -0.5, 0.2], [1.0, 0.0, 0.0])
    wins = -math.log(sigmoid(1.5)) - math.log(sigmoid(0.8))
    tie = -(math.log(sigmoid(0.7)) + math.log(sigmoid(-0.7))) / 2 - math.log(2)
    assert count == 3
    assert value == pytest.approx(wins + tie, rel=1e-6)
    value, count, gradient = loss_of([0.3, 0.3], [1.0, 1.0])
    assert (value, count) == (pytest.approx(0, abs=1e-7), 1)
    assert gradient == pytest.approx([0, 0], abs=1e-7)
    _, _, gradient = loss_of([2.0, 0.0], [1.0, 1.0])  # apart: they are drawn together
    assert gradient[0] == pytest.approx(sigmoid(2.0) - 0.5, rel=1e-5)
    assert loss_of([2.0, 0.0], [1.0, 1.0], ties="drop")[:2] == (0, 0)


def test_rao_and_kupper_give_three_outcomes_whose_probabilities_sum_to_one():
    eta = torch.tensor(math.log(1.5))
    strengths = [math.exp(0.4), 1.0]  # of scores 0.4 and 0
    win = strengths[0] / (strengths[0] + 1.5 * strengths[1])
    loss = strengths[1] / (strengths[1] + 1.5 * strengths[0])
    for merits, chance in (([1.0, 0.0], win), ([0.0, 1.0], loss), ([1.0, 1.0], 1 - win - loss)):
        value, _, _ = loss_of([0.4, 0.0], merits, ties="rao_kupper", eta=eta)
        assert value == pytest.approx(-math.log(chance), rel=1e-5)


def test_the_gradient_of_a_pair_vanishes_where_it_is_right_and_is_one_where_it_is_wrong():
    assert loss_of([40.0, 0.0], [1.0, 0.0])[2] == pytest.approx([0, 0], abs=1e-6)
    assert loss_of([0.0, 40.0], [1.0, 0.0])[2] == pytest.approx([-1, 1], abs=1e-6)
    assert loss_of([0.0, 0.0], [1.0, 0.0])[2] == pytest.approx([-0.5, 0.5])


def test_plackett_luce_chooses_the_best_among_all_then_among_the_rest():
    scores = torch.tensor([[0.5, -1.0, 2.0, 7.0]], requires_grad=True)
    loss, count = plackett_luce(scores, torch.tensor([[3.0, 1.0, 2.0, NAN]]))
    first = -0.5 + math.log(math.exp(0.5) + math.exp(-1.0) + math.exp(2.0))
    second = -2.0 + math.log(math.exp(2.0) + math.exp(-1.0))
    assert int(count) == 2
    assert loss.item() == pytest.approx(first + second, rel=1e-6)
    loss.sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 3] == 0  # no picture there


def test_plackett_luce_of_two_is_bradley_terry_and_of_equal_merits_nothing():
    scores, merits = torch.tensor([[0.3, 1.1]]), torch.tensor([[1.0, 0.0]])
    labels, counted = compare(merits)
    assert plackett_luce(scores, merits)[0].item() == pytest.approx(bradley_terry(scores, labels, counted)[0].item())
    loss, count = plackett_luce(scores, torch.ones(1, 2))
    assert (loss.item(), int(count)) == (0, 0)
    tied, _ = plackett_luce(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert tied.item() == pytest.approx(2 * (-1 + math.log(2 * math.e + 1)), rel=1e-6)  # one choice set for both
