"""What every scorer of the table promises; adding a scorer adds its tests."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from t2i_align.data.images import pil_to_tensor
from t2i_align.playground.world import sample_scenes
from t2i_align.prompts import Prompts
from t2i_align.rewards import SCORERS, FunctionScorer, RewardError, load_reward, scorer_class
from tests.tiny_scorers import TINY, trained
from tests.tiny_vlm import VLM

PROMPT = "a red circle"
SPECS = [*SCORERS, "2 * verifier - 0.1 * jpeg_incompressibility", "brightness", "trained"]


def load(spec, folder):
    if spec == "brightness":
        return load_reward(FunctionScorer(lambda images: images.mean((1, 2, 3)), spec, differentiable=True))
    if spec == "trained":
        return load_reward(trained(folder))
    if made := (TINY | VLM).get(spec):
        return load_reward(made(folder))
    if spec in SCORERS and (missing := scorer_class(spec).missing()):
        pytest.skip(missing)
    return load_reward(spec)


@pytest.fixture(scope="module", params=SPECS)
def scorer(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def scenes():
    return list(sample_scenes(6, seed=3))


@pytest.fixture(scope="module")
def pictures(scenes):
    return [scene.render() for scene in scenes]


@pytest.fixture(scope="module")
def prompts(scorer, scenes, pictures):
    """One prompt a picture, with the columns that a scorer reads."""
    texts = [ask(scorer, str(scene.caption)) for scene in scenes]
    return Prompts(tuple(texts), {"reference": tuple(pictures[1:] + pictures[:1])})


def ask(scorer, prompt):
    """A prompt that a scorer can score."""
    return f'{prompt} and the words "no way"' if scorer.name == "ocr" else prompt


def table(scorer, prompt, rows=1):
    """The same prompt in every row, with the columns that a scorer reads."""
    return Prompts((ask(scorer, prompt),) * rows, {"reference": (flat(),) * rows})


def stack(pictures):
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


@pytest.mark.parametrize("size", [1, 3])
def test_scores_are_one_float32_per_image(scorer, pictures, prompts, size):
    scores = scorer.scores(pictures[:size], prompts[:size])
    assert scores.total.shape == (size,)
    assert scores.total.dtype == torch.float32
    assert scores.parts
    assert all(part.shape == (size,) and part.dtype == torch.float32 for part in scores.parts.values())
    assert scores.std is None or scores.std.shape == (size,)


def test_no_images_give_no_scores(scorer):
    assert scorer.scores(torch.zeros(0, 3, 64, 64), Prompts(())).total.shape == (0,)


def test_scores_do_not_depend_on_batch_mates_or_order(scorer, pictures, prompts):
    together = scorer.scores(pictures, prompts).total
    alone = torch.cat([scorer.scores(picture, prompts[[row]]).total for row, picture in enumerate(pictures)])
    backwards = scorer.scores(pictures[::-1], prompts[::-1], batch_size=4).total.flip(0)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backwards, together, rtol=1e-4, atol=1e-4)


def test_differentiable_tells_the_truth(scorer, pictures, prompts):
    images = stack(pictures[:2]).requires_grad_()
    if not scorer.differentiable:
        with pytest.raises(RewardError, match="not differentiable"):
            scorer.scores(images, prompts[:2])
        return
    total = scorer.scores(images, prompts[:2]).total
    (gradient,) = torch.autograd.grad(total.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.abs().flatten(1).sum(1) > 0).all()


def test_no_graph_is_kept_when_none_is_asked_for(scorer, pictures, prompts):
    assert not scorer.scores(stack(pictures[:1]), prompts[:1]).total.requires_grad


def test_kinds_of_input_agree(scorer, pictures, prompts, tmp_path):
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    array = np.asarray(pictures[0])
    inputs = [pictures[0], [pictures[0]], path, str(path), array, array[None], pil_to_tensor(pictures[0])]
    values = torch.cat([scorer.scores(one, prompts[:1]).total for one in inputs])
    tolerance = max(getattr(scorer, "tolerance", 0.0), 1e-6)
    torch.testing.assert_close(values, values[:1].expand_as(values), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "1", "CMYK"])
def test_picture_modes_work(scorer, pictures, prompts, mode):
    assert scorer.scores(pictures[0].convert(mode), prompts[:1]).total.isfinite().all()


def test_sizes_may_differ_within_a_call(scorer, pictures, prompts):
    sizes = [(64, 64), (96, 48), (31, 77), (64, 64)]
    images = [pictures[i].resize(size) for i, size in enumerate(sizes)]
    together = scorer.scores(images, prompts[:4]).total
    alone = torch.cat([scorer.scores(image, prompts[[row]]).total for row, image in enumerate(images)])
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (300, 20)])
def test_odd_sizes_are_scored_or_refused_with_a_reason(scorer, prompts, size):
    picture = Image.new("RGB", size, "red")
    if (scorer.name == "clip_iqa" and min(size) < 31) or (scorer.name == "vlm_judge" and min(size) < 2):
        pytest.skip("smaller than what it reads")
    assert scorer.scores(picture, prompts[:1]).total.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", ["", " ", "猫と犬 🐱 – naïve", "a\nb\tc", "a\0b", "{text_prompt} {} %s"])
def test_odd_prompts_are_scored_alike_in_any_batch_or_refused(scorer, pictures, prompt):
    asked = table(scorer, prompt)
    if scorer.refuse(asked[0]):
        with pytest.raises(RewardError, match="cannot score"):
            scorer.scores(pictures[0], asked)
        return
    alone, (first, _) = (
        scorer.scores(pictures[0], asked).total,
        scorer.scores(pictures[:2], asked + table(scorer, PROMPT)).total,
    )
    assert alone.isfinite().all()
    torch.testing.assert_close(alone[0], first, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_is_no_text_is_refused(scorer, pictures):
    with pytest.raises(ValueError, match="UTF-8 text"):
        scorer.scores(pictures[0], table(scorer, "half a pair \ud800"))


def test_values_stay_in_the_declared_range(scorer, prompts):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]
    images += [Image.new("RGB", (64, 64), colour) for colour in ("white", "black", "red")]
    low, high = scorer.range
    total = scorer.scores(images, prompts).total
    assert (total >= low - 1e-6).all()
    assert (total <= high + 1e-6).all()


def test_a_prompt_is_asked_for_exactly_where_it_is_needed(scorer, pictures):
    if scorer.needs_prompt or scorer.columns:
        with pytest.raises(RewardError, match=r"one prompt per image|prompt columns reference"):
            scorer.scores(pictures)
    else:
        assert scorer.scores(pictures).total.isfinite().all()


def test_a_prompt_of_another_number_is_refused(scorer, pictures):
    with pytest.raises(ValueError, match="Expected one prompt for each of 6 images but got 2"):
        scorer.scores(pictures, [PROMPT] * 2)


@pytest.mark.filterwarnings("ignore")
def test_a_very_long_prompt_warns_or_is_refused_with_a_reason(scorer, pictures):
    prompt = table(scorer, "a red circle " * 200)
    reason = scorer.refuse(prompt[0])
    if reason:
        with pytest.raises(RewardError, match="cannot score"):
            scorer.scores(pictures[0], prompt)
    else:
        assert scorer.scores(pictures[0], prompt).total.isfinite().all()


def test_the_table_declares_facts(scorer):
    if type(scorer).__name__ in {target.rpartition(":")[2] for target in SCORERS.values()}:
        assert SCORERS[scorer.name]
        assert scorer.summary
        assert scorer.license
        assert scorer.range[0] < scorer.range[1]


def flat():
    return Image.new("RGB", (64, 64), (128, 128, 128))


def noisy():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def circle():
    return next(
        s for s in sample_scenes(500, 0) if str(s.caption).startswith(PROMPT) and s.caption.kind == "single"
    ).render()


def sign():
    picture = Image.new("RGB", (192, 64), "white")
    ImageDraw.Draw(picture).text((30, 16), "no way", fill="black", font_size=32)
    return picture


BETTER = {  # scorer -> (better, worse) picture for PROMPT
    "verifier": (circle, noisy),
    "jpeg_compressibility": (flat, noisy),
    "jpeg_incompressibility": (noisy, flat),
    "tiny_clip": (circle, noisy),
    "tiny_pick": (circle, noisy),
    "subject": (flat, noisy),  # the reference is flat
    "vlm_judge": (circle, noisy),
    "ocr": (sign, noisy),
    # Networks that know nothing until they have the published weights:
    **dict.fromkeys(
        ("clip", "pickscore", "hpsv2", "hpsv2.1", "mps", "aesthetic", "aesthetic_v2.5", "clip_iqa", "vlm_rm"),
        (circle, noisy),
    ),
    **dict.fromkeys(("image_reward", "cyclereward", "vqascore", "hpsv3"), (circle, noisy)),
}


@pytest.mark.parametrize("name", SCORERS)
def test_larger_is_better(name, tmp_path):
    better, worse = BETTER[name]
    missing = scorer_class(name).missing()
    if missing and name not in ("subject", "vlm_judge"):  # these tell pictures apart without having learnt anything
        pytest.skip(missing)
    scorer = load(name, tmp_path) if missing else load_reward(name)
    total = scorer.scores([better(), worse()], table(scorer, PROMPT, 2)).total
    assert total[0] > total[1]


def test_columns_that_are_missing_are_named(pictures):
    scorer = load_reward("verifier")
    scorer.columns = ("reference",)
    with pytest.raises(RewardError, match="reference"):
        scorer.scores(pictures[:1], Prompts((PROMPT,)))
