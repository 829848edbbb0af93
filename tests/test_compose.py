import math
import warnings

import pytest
import torch
from torch import nn

from t2i_align.rewards import FunctionScorer, RewardError, Scorer, WeightedSum, check_reward, load_reward
from t2i_align.rewards.compose import Composite, Named, expression, weighted_sum
from t2i_align.rewards.ensemble import Mean
from t2i_align.rewards.expression import Call, Limit, Limited, Part, Sum, parse_expression, read_reward, split_rewards

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a", [(1.0, "a")]),
        ("2 * a + b - 0.1 * c", [(2.0, "a"), (1.0, "b"), (-0.1, "c")]),
        ("- a + 1e-3 * b.c", [(-1.0, "a"), (0.001, "b.c")]),
        ("rank(a)", [(1.0, Call("rank", ("a",)))]),
        ("lcb(a, b, k=2) - c", [(1.0, Call("lcb", ("a", "b"), {"k": 2.0})), (-1.0, "c")]),
        ("zscore(2 * a + b)", [(1.0, Call("zscore", (Sum(((2.0, "a"), (1.0, "b"))),)))]),
        ("f(a, low=-inf, high=.5)", [(1.0, Call("f", ("a",), {"low": -math.inf, "high": 0.5}))]),
        ("3 * f( g( a ) , b=x/y )", [(3.0, Call("f", (Call("g", ("a",)),), {"b": "x/y"}))]),
    ],
)
def test_expressions_are_read(text, terms):
    assert parse_expression(text) == terms


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2 *",
        "a +",
        "a b",
        "2 * 3",
        "2*a",
        "a+b",
        "* a",
        "nan * a",
        "inf * a",
        "a + + b",
        "f()",
        "f(a",
        "f(a,)",
        "a)",
        "f(a) b",
        "(a)",
        "f(k=)a",
        "f(a b)",
    ],
)
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


def test_a_column_instead_of_a_row_is_refused():
    class Column(Scorer):
        name = "column"

        def forward(self, images, prompts):
            return images.mean((1, 2, 3))[:, None]

    with pytest.raises(RewardError, match=r"one number for each of 3 images but got shape \(3, 1\)"):
        (Column() + mean("a")).scores(IMAGES)


@pytest.mark.parametrize("spec", ["pikscore", ":x", "t2i_align.rewards:Nothing", "t2i_align.keys:key", 3])
def test_unknown_rewards_are_refused(spec):
    with pytest.raises(RewardError):
        load_reward(spec)


def test_a_class_of_a_module_can_be_named():
    assert load_reward("t2i_align.rewards.verifier:Verifier").name == "verifier"


def test_lists_are_split_outside_parentheses():
    assert split_rewards("a, lcb(b, c, k=1) ,2 * d,") == ["a", "lcb(b, c, k=1)", "2 * d"]


def test_mappings_are_read():
    block = {"use": "b + c", "weight": 2, "transform": ["zscore", {"lcb": {"k": 3}}]}
    part = Part("safe", Sum(((1.0, "b"), (1.0, "c"))))
    assert read_reward({"a": 0.5, "safe": block}) == Sum(
        ((0.5, "a"), (2.0, Call("lcb", (Call("zscore", (part,)),), {"k": 3})))
    )
    assert read_reward({"a": 1}) == "a"
    assert read_reward({"x": {"use": "a", "options": {"size": 3}}}) == Part("x", "a", {"size": 3})
    limited = read_reward({"a": 1, "b": {"at_least": "base"}, "c": {"use": "d", "at_most": 2}})
    assert limited == Limited("a", (Limit(Part("b", "b"), "at_least", "base"), Limit(Part("c", "d"), "at_most", 2.0)))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "at least one scorer"),
        ({"verifier": {"at_least": 1}}, "at least one scorer"),
        ({"verifier": "much"}, "weight of 'verifier' to be a number"),
        ({"verifier": True}, "to be a number"),
        ({"verifier": {"wieght": 1}}, "Did you mean 'weight'"),
        ({"verifier": {"transform": 3}}, "name or {name: options}"),
        ({"verifier": {"transform": "zscroe"}}, "Did you mean 'zscore'"),
        ({"verifier": {"transform": {"zscore": {"dof": 1}}}}, "Did you mean 'ddof'"),
        ({"verifier": {"options": {"size": 1}}}, "no option 'size'"),
        ({"verifier": {"transform": {"zscore": {"ddof": True}}}}, "expects a whole number for ddof but got True"),
        ({"ocr": {"options": {"strict": "no"}}}, "expects true or false for strict but got 'no'"),
        ({"tiny_clip": {"transform": {"lcb": {"k": "1"}}}}, "expects a number for k but got '1'"),
        ({"x": {"use": "verifier + jpeg_compressibility", "options": {"size": 1}}}, "the name of one scorer"),
        ({"a": 1, "verifier": {"weight": 1, "at_least": 1}}, "one of weight"),
        ({"a": 1, "verifier": {"at_least": "bsae"}}, "unless it is 'base'"),
    ],
)
def test_bad_mappings_are_refused_with_the_reason(mapping, message):
    with pytest.raises(RewardError, match=message):
        check_reward(mapping)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrost(verifier, verifier)", "Did you mean 'worst'"),
        ("rank(verifier, jpeg_compressibility)", "cannot be made"),
        ("lcb(verifier, n=3)", "no option 'n'"),
        ("lcb(verfier)", "Did you mean 'verifier'"),
        ("worst(verifier)", "2 or more members"),
        ("log_sigmoid(verifier, center=median)", "mean or a quantile"),
        ("par(verifier, scale=-1)", "positive number"),
        ("calibrated(verifier)", "needs a base"),
        ("lcb(verifier, k=abc)", "The function lcb expects a number for k but got 'abc'"),
        ("lcb(verifier, k=nan)", "expects a number for k but got 'nan'"),
        ("zscore(verifier, ddof=x)", "The function zscore expects a whole number for ddof but got 'x'"),
        ("zscore(verifier, ddof=inf)", "expects a whole number for ddof but got inf"),
        ("consistent(verifier, views=2.5)", "expects a whole number for views but got 2.5"),
        ("2 * zscore", r"write zscore\(SCORER\)"),
    ],
)
def test_bad_functions_are_refused_with_the_reason(text, message):
    with pytest.raises(RewardError, match=message):
        load_reward(text)


def test_a_block_gives_its_name_to_raw_parts():
    reward = load_reward({"small": {"use": "jpeg_compressibility", "weight": 2, "transform": "zscore"}})
    scores = reward.scores(IMAGES)
    raw = load_reward("jpeg_compressibility").scores(IMAGES).total
    assert list(scores.parts) == ["small"] == list(reward.part_names())
    torch.testing.assert_close(scores.parts["small"], raw)
    torch.testing.assert_close(scores.total, 2 * (raw - raw.mean()) / raw.std(correction=0))


def test_names_of_compositions_are_read_back():
    text = "2 * zscore(verifier) - worst(verifier, 0.5 * jpeg_compressibility, ddof=1) + lcb(verifier, verifier, k=2)"
    assert load_reward(text).name == text
    assert read_reward(load_reward(text).name) == read_reward(text)


def test_infinite_options_are_read():
    assert load_reward("clamp(verifier, low=-inf, high=0.5)").name == "clamp(verifier, high=0.5)"
    assert load_reward("clamp(verifier, low=-inf, high=inf)").high == math.inf


def test_a_text_longer_than_a_path_is_read():
    text = " + ".join(f"{weight} * clamp(verifier, high={weight})" for weight in range(1, 40))
    assert len(text) > 255
    assert check_reward(text) == read_reward(text)
    with pytest.raises(RewardError, match="Unknown scorer"):
        check_reward("x" * 300)


def test_operators_make_sums():
    a, b, c = mean("a"), mean("b", 2.0), mean("c", 3.0)
    made = 2 * a + b - 0.1 * c
    assert made.name == "2 * a + b - 0.1 * c"
    value = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(made.scores(IMAGES).total, (2 + 2 - 0.3) * value)
    assert (2 * (a + b) / 4 - c + a).name == "1.5 * a + 0.5 * b - c"
    assert sum([a, b, c]).name == "a + b + c"
    assert (-a).name == "- a"
    assert (a * 2).scores(IMAGES).total.allclose(2 * value)
    for bad in (lambda: a + 1, lambda: a * b, lambda: "x" + a, lambda: a - 1, lambda: a / b):
        with pytest.raises(TypeError):
            bad()
    with pytest.raises(RewardError, match="not 0"):
        a - a


class Counting(Scorer):
    """A scorer that keeps the very tensors it was shown."""

    differentiable = True

    def __init__(self, name):
        super().__init__()
        self.name, self.seen = name, []

    def forward(self, images, prompts):
        self.seen.append(images)
        return images.mean((1, 2, 3))


def test_members_get_the_same_tensor_chunk_by_chunk():
    first, second = Counting("a"), Counting("b")
    (first + 2 * second).scores(torch.rand(5, 3, 4, 4), batch_size=2)
    assert [len(images) for images in first.seen] == [2, 2, 1]
    assert all(one is other for one, other in zip(first.seen, second.seen, strict=True))


def test_members_get_the_same_tensor_inside_a_training_step():
    first, second = Counting("a"), Counting("b")
    images = torch.rand(2, 3, 4, 4).requires_grad_()
    value = Mean(first + second, 2 * second)(images, None)[0]
    assert first.seen[0] is second.seen[0] is images
    assert len(second.seen) == 1
    value.sum().backward()
    assert (images.grad != 0).all()


def test_a_scorer_in_several_places_runs_once():
    leaf = Counting("a")
    made = weighted_sum((1.0, leaf), (1.0, Mean(leaf, Named(leaf, "b"))))
    assert made.part_names() == ("a", "b")
    made.scores(IMAGES)
    assert len(leaf.seen) == 1
    assert made.leaves() == [leaf]


def test_a_scorer_named_twice_in_a_text_is_one_object():
    reward = load_reward("zscore(jpeg_compressibility) + 0.1 * jpeg_compressibility")
    assert len(reward.leaves()) == 1
    assert list(reward.scores(IMAGES).parts) == ["jpeg_compressibility"]


def test_different_scorers_of_one_name_are_refused():
    with pytest.raises(RewardError, match="Two different scorers are called 'a'"):
        Mean(mean("a"), mean("a", 2.0)).scores(IMAGES)


def gappy(name, values):
    return FunctionScorer(lambda images: torch.tensor(values)[: len(images)], name)


@pytest.mark.filterwarnings("ignore:The scorer .b.")
def test_a_nan_masks_its_member_for_its_row_and_is_said():
    nan = math.nan
    made = 2 * gappy("a", [1.0, nan, nan]) - 0.5 * gappy("b", [4.0, 4.0, nan])
    with pytest.warns(RuntimeWarning, match=r"'a' gave no number \(NaN\) for some images"):
        scores = made.scores(IMAGES)
    assert scores.total[:2].tolist() == [0.0, -0.5 * 4 * 2.5 / 0.5]  # the others' weighted mean, at the whole weight
    assert scores.total[2].isnan()
    assert scores.parts["a"][1:].isnan().all()


def test_without_nan_no_weight_is_touched_and_nothing_is_said():
    made = 0.1 * mean("a") + 0.2 * mean("b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        total = made.scores(IMAGES).total
    value = IMAGES.mean((1, 2, 3))
    assert torch.equal(total, torch.stack([0.1 * value, 0.2 * value]).sum(0))


class Gap(Scorer):
    """NaN for the first image, differentiable elsewhere."""

    name, differentiable = "gap", True

    def forward(self, images, prompts):
        values = images.mean((1, 2, 3))
        return torch.where(torch.arange(len(images)) == 0, torch.nan, values), values.square()


@pytest.mark.filterwarnings("ignore:The scorer")
def test_masked_rows_have_the_others_gradient():
    images = torch.rand(2, 3, 4, 4).requires_grad_()
    scores = (mean("a") + Gap()).scores(images)
    (gradient,) = torch.autograd.grad(scores.total.sum() + scores.std.sum(), images)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[0], torch.full((3, 4, 4), 2 / 48))
    assert scores.std[0] == 0


def test_the_std_of_a_masked_row_is_that_of_the_rest():
    made = weighted_sum((3.0, Uncertain()), (1.0, gappy("b", [0.0, math.nan, 0.0])))
    with pytest.warns(RuntimeWarning):
        assert made.scores(IMAGES).std.tolist() == [9.0, 12.0, 9.0]


def test_scores_of_no_images_have_every_part():
    scores = load_reward("2 * verifier - worst(jpeg_compressibility, verifier)").scores([], [])
    assert set(scores.parts) == {"verifier", "jpeg_compressibility"}


def test_a_composite_of_prompt_readers_reads_prompts():
    made = load_reward("worst(verifier, jpeg_compressibility)")
    assert isinstance(made, Composite)
    assert made.needs_prompt
    assert made.refuse("nonsense")
    with pytest.raises(RewardError, match="cannot score 'nonsense'"):
        made.scores(IMAGES, "nonsense")
