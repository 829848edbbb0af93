import pytest
import torch
from torch import nn

from t2i_align.rewards import FunctionScorer, RewardError, Scorer, WeightedSum, load_reward
from t2i_align.rewards.compose import expression
from t2i_align.rewards.expression import parse_expression

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a", [(1.0, "a")]),
        ("2 * a + b - 0.1 * c", [(2.0, "a"), (1.0, "b"), (-0.1, "c")]),
        ("- a + 1e-3 * b.c", [(-1.0, "a"), (0.001, "b.c")]),
    ],
)
def test_expressions_are_read(text, terms):
    assert parse_expression(text) == terms


@pytest.mark.parametrize("text", ["", "2 *", "a +", "a b", "2 * 3", "2*a", "a+b", "* a", "nan * a", "a + + b"])
def test_what_is_no_sum_is_refused(text):
    with pytest.raises(RewardError, match="Expected a reward such as"):
        parse_expression(text)


def mean(name, scale=1.0, differentiable=True):
    return FunctionScorer(lambda images: scale * images.mean((1, 2, 3)), name, differentiable)


class Uncertain(Scorer):
    name = "uncertain"

    def forward(self, images, prompts):
        return images.mean((1, 2, 3)), torch.full((len(images),), 3.0)


def test_a_sum_keeps_parts_in_their_own_units():
    scores = WeightedSum([(2.0, mean("a")), (-0.5, mean("b", 10.0))]).scores(IMAGES)
    value = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(scores.parts["b"], 10 * value)
    torch.testing.assert_close(scores.total, 2 * value - 5 * value)
    assert scores.std is None


def test_the_std_of_a_sum_adds_squares():
    scores = WeightedSum([(2.0, Uncertain()), (1.0, mean("a"))]).scores(IMAGES)
    torch.testing.assert_close(scores.std, torch.full((3,), 6.0))
    assert load_reward(Uncertain()).scores(IMAGES).std.tolist() == [3.0] * 3


def test_a_sum_is_differentiable_if_all_its_parts_are():
    assert WeightedSum([(1.0, mean("a")), (1.0, mean("b"))]).differentiable
    assert not WeightedSum([(1.0, mean("a")), (1.0, mean("b", differentiable=False))]).differentiable


def test_forms_of_one_reward_agree():
    forms = ["2 * verifier - 0.1 * jpeg_compressibility", {"verifier": 2, "jpeg-compressibility": -0.1}]
    totals = [load_reward(form).scores(IMAGES, "a red circle").total for form in forms]
    torch.testing.assert_close(*totals)
    sums = WeightedSum([(2.0, load_reward("verifier")), (-0.1, load_reward("jpeg_compressibility"))])
    assert sums.name == expression([(2.0, load_reward("verifier")), (-0.1, load_reward("jpeg_compressibility"))])
    torch.testing.assert_close(sums.scores(IMAGES, "a red circle").total, totals[0])


def test_weights_of_nothing_are_refused():
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(RewardError, match="finite and not 0"):
            WeightedSum([(weight, mean("a"))])
    with pytest.raises(RewardError, match="a twice"):
        WeightedSum([(1.0, mean("a")), (1.0, mean("a"))])


def test_callables_get_the_prompts_only_if_they_ask():
    def with_prompts(images, prompts):
        return [float(len(prompt)) for prompt in prompts]

    def with_an_option(images, scale=2.0):
        return scale * images.mean((1, 2, 3))

    assert load_reward(with_prompts).scores(IMAGES, ["a", "bb", "ccc"]).total.tolist() == [1.0, 2.0, 3.0]
    torch.testing.assert_close(load_reward(with_an_option).scores(IMAGES).total, 2 * IMAGES.mean((1, 2, 3)))


def test_a_module_is_a_callable_and_keeps_its_gradients():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images):
            return self.scale * images.mean((1, 2, 3))

    net = Net()
    torch.testing.assert_close(load_reward(net).scores(IMAGES).total, IMAGES.mean((1, 2, 3)))
    assert net.scale.requires_grad


def test_a_callable_of_the_wrong_shape_is_refused():
    with pytest.raises(RewardError, match="one number for each of 3 images"):
        load_reward(lambda images: images.mean()).scores(IMAGES)


@pytest.mark.parametrize("spec", ["pikscore", ":x", "t2i_align.rewards:Nothing", "t2i_align.keys:key", 3])
def test_unknown_rewards_are_refused(spec):
    with pytest.raises(RewardError):
        load_reward(spec)


def test_a_class_of_a_module_can_be_named():
    assert load_reward("t2i_align.rewards.verifier:Verifier").name == "verifier"
