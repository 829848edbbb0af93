"""The published scorers on CLIP: original key names, numbers against the original recipes, real fixtures, sharing."""

import hashlib
import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import CLIPImageProcessor, CLIPModel, SiglipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from t2i_align.data.images import pil_to_tensor
from t2i_align.playground.world import sample_scenes
from t2i_align.prompts import Prompts
from t2i_align.rewards import RewardError, check_reward, load_reward, scorer_class
from t2i_align.rewards.aesthetic import HEADS, Aesthetic, score_features
from t2i_align.rewards.aesthetic_v25 import AestheticV25
from t2i_align.rewards.checkpoints import clip_tokenizer
from t2i_align.rewards.clip import CLIP
from t2i_align.rewards.clip_iqa import PAIRS, ClipIQA
from t2i_align.rewards.files import WeightFile, find_weights, missing_files, read_weights, sha256
from t2i_align.rewards.hpsv2 import COMMIT, HPSv2, HPSv21
from t2i_align.rewards.mps import MPS
from t2i_align.rewards.pickscore import PickScore
from t2i_align.rewards.subject import Subject
from t2i_align.rewards.tower import CLIP_MEAN, CLIP_STD, Preprocessing
from t2i_align.rewards.vlm_rm import VLMRM, regularised
from tests import tiny_scorers as tiny

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL_HEAD = SHARED / "laion_aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"
TEXTS = ["a red circle", "naïve café — 東京 🐱 & don't", "two green stars " * 40, ""]


@pytest.fixture(scope="module")
def photos():
    """Pictures with edges and texture, wide, high and square, none of the networks' size."""
    rng = torch.Generator().manual_seed(0)
    soft = F.interpolate(torch.rand(3, 3, 9, 7, generator=rng), (190, 150), mode="bicubic").clamp(0, 1)
    noisy = (soft + 0.1 * torch.randn(soft.shape, generator=rng)).clamp(0, 1)
    pictures = [v2.functional.to_pil_image(image) for image in noisy]
    wide = pictures[1].transpose(Image.Transpose.ROTATE_90)
    return [pictures[0], wide, pictures[2].resize((171, 171)), pictures[0].resize((100, 133))]  # the last: odd margins


@pytest.fixture(scope="module")
def pictures():
    return [scene.render() for scene in sample_scenes(4, seed=5)]


def tensors(pictures):
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


# Preprocessing and words


def test_pictures_are_prepared_as_pillow_prepares_them_with_and_without_a_gradient(photos):
    how = Preprocessing((64, 64), CLIP_MEAN, CLIP_STD, floor_crop=True)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    for photo in photos:
        theirs = CLIPImageProcessorPil(**size)(images=photo, return_tensors="pt").pixel_values
        x = pil_to_tensor(photo)[None].requires_grad_()
        torch.testing.assert_close(how(x.detach()), theirs, rtol=0, atol=2e-6)
        torch.testing.assert_close(how(x).detach(), theirs, rtol=0, atol=2e-6)
        assert torch.autograd.grad(how(x).square().sum(), x)[0].abs().sum() > 0
        level = 1 / 255 / min(CLIP_STD)  # what torchvision's resize of 8-bit pictures may differ by from Pillow's
        today = CLIPImageProcessor(**size)(images=photo, return_tensors="pt").pixel_values
        torch.testing.assert_close(how(x.detach()), today, rtol=0, atol=1.01 * level)


def test_the_middle_is_cut_out_of_a_larger_resize(photos):
    how = Preprocessing((56, 56), (0.0,) * 3, (1.0,) * 3, before_crop=64, floor_crop=True)
    for photo in photos:
        crop = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_normalize": False}
        theirs = CLIPImageProcessorPil(**crop)(images=photo, return_tensors="pt").pixel_values
        torch.testing.assert_close(how(pil_to_tensor(photo)[None]), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["A cat with two horns", "naïve café — 東京 🐱 don't", "  Two\n spaces", "", "1234th"])
def test_our_clip_tokenizer_has_the_published_vocabulary(text):
    """Against open_clip's own implementation of it; they differ only in HTML entities and typographic quotes."""
    words = open_clip.SimpleTokenizer()
    ids = clip_tokenizer()(text).input_ids
    assert ids == [49406, *words.encode(text), 49407]
    assert len(clip_tokenizer()) == 49408


# PickScore


def test_pickscore_is_the_published_recipe(photos, tmp_path):
    """transformers 4.27's recipe in today's library: logit_scale.exp() * cosine, processor on PIL images."""
    tiny.hf_clip(tmp_path)
    model, words = CLIPModel.from_pretrained(tmp_path).eval(), clip_tokenizer()
    model.logit_scale.data.fill_(math.log(100.3))  # learnt: not 100
    model.save_pretrained(tmp_path)
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    with torch.no_grad():
        pixels = CLIPImageProcessorPil(**side)(images=photos, return_tensors="pt").pixel_values
        inputs = words(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(**inputs).pooler_output
        image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
        expected = model.logit_scale.exp() * (text * image).sum(1)
    scorer = PickScore(str(tmp_path))
    with pytest.warns(UserWarning, match="reads 77 tokens"):
        total = scorer.scores(photos, TEXTS).total
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    assert scorer.range[1] == pytest.approx(100.3, rel=1e-5)


def test_pickscore_says_how_to_get_its_two_files(tmp_path):
    with pytest.raises(
        RewardError, match=r"`hf download yuvalkirstain/PickScore_v1 model.safetensors config.json --revision"
    ):
        PickScore()
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match="config.json, but there is no such file"):
        PickScore(str(tmp_path))


# HPSv2


def letterbox(picture, side, antialias):
    """The published transform: ToTensor, longest side to `side`, centred on black, normalised."""
    x = v2.functional.to_dtype(v2.functional.to_image(picture), torch.float32, scale=True)
    height, width = x.shape[1:]
    scale = side / float(max(height, width))
    size = [round(edge * scale) for edge in (height, width)]
    x = v2.functional.resize(x, size, v2.InterpolationMode.BICUBIC, antialias=antialias)
    high, wide = side - size[0], side - size[1]
    x = v2.functional.pad(x, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    return v2.functional.normalize(x, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("version", ["v2", "v2.1"])
def test_hpsv2_is_the_published_recipe(photos, tmp_path, version, antialias):
    made = tiny.hpsv2(tmp_path, version)
    scorer = type(made)(str(tmp_path), antialias, "tiny-hps", tiny.SIDE)
    model = open_clip.create_model("tiny-hps", output_dict=True).eval()
    file = tmp_path / f"HPS_{version}_compressed.pt"
    model.load_state_dict(torch.load(file, weights_only=True)["state_dict"], strict=True)
    with torch.no_grad():
        pixels = torch.stack([letterbox(photo, tiny.SIDE, antialias) for photo in photos])
        output = model(pixels, open_clip.get_tokenizer("tiny-hps")(TEXTS))
        expected = torch.diagonal(output["image_features"] @ output["text_features"].T)
    with pytest.warns(UserWarning, match="reads 77 tokens"):
        total = scorer.scores(photos, TEXTS).total
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


def test_hpsv2_reads_the_checkpoint_of_its_version(tmp_path):
    tiny.hpsv2(tmp_path)
    with pytest.raises(RewardError, match=r"HPS_v2.1_compressed.pt, but there is no such file"):
        HPSv21(str(tmp_path), model="tiny-hps", size=tiny.SIDE)
    with pytest.raises(RewardError, match=r"`hf download xswu/HPSv2 HPS_v2_compressed.pt --revision"):
        HPSv2()
    state = torch.load(tmp_path / "HPS_v2_compressed.pt", weights_only=True)
    state["state_dict"]["score_predictor.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(RewardError, match="score_predictor"):
        HPSv2(str(tmp_path), model="tiny-hps", size=tiny.SIDE)


def test_hpsv2_has_the_published_architecture():
    """Of the full size, without its weights: names and shapes of ViT-H/14 with exact GELU."""
    with torch.device("meta"):
        config = open_clip.get_model_config("ViT-H-14")
        model = open_clip.model.CLIP(**config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes["visual.conv1.weight"] == (1280, 3, 14, 14)
    assert shapes["visual.positional_embedding"] == (257, 1280)
    assert shapes["text_projection"] == (1024, 1024)
    assert sum(name.startswith("visual.transformer.resblocks.") for name in shapes) == 32 * 12
    assert not config.get("quick_gelu", False)


def test_a_picture_whose_longest_side_fits_is_padded(tmp_path, pictures):
    scorer = tiny.hpsv2(tmp_path)
    wide = pictures[0].resize((tiny.SIDE, 20))
    assert scorer.scores(wide, "a red circle").total.isfinite().all()  # the published code stops here
    pixels = scorer.tower.preprocessing(pil_to_tensor(wide)[None])
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels[0, :, 0, 0], black)
    torch.testing.assert_close(pixels[0, :, 6:26], letterbox(wide, tiny.SIDE, True)[:, 6:26])


# Aesthetic


@pytest.fixture(scope="module")
def real_head(tmp_path_factory):
    """The published head on a small CLIP of its width."""
    if not REAL_HEAD.is_file():
        pytest.skip(f"{REAL_HEAD} is not here")
    folder = tmp_path_factory.mktemp("large")
    tiny.hf_clip(folder, words=True, width=768)
    return Aesthetic(weights=str(REAL_HEAD), name=str(folder))


def test_the_published_head_gives_the_published_numbers(real_head):
    ones = torch.ones(1, 768) / math.sqrt(768)
    assert score_features(real_head.layers, ones).item() == pytest.approx(4.883285, abs=2e-6)
    assert score_features(real_head.layers, torch.zeros(1, 768)).item() == pytest.approx(5.236646, abs=2e-6)
    w = score_features(real_head.layers, torch.eye(768)) - score_features(real_head.layers, torch.zeros(1, 768))
    assert w.norm().item() == pytest.approx(17.995625, rel=1e-5)
    assert w[:4].tolist() == pytest.approx([-0.69159, -0.55699, -0.32117, -0.63148], abs=2e-5)
    random = F.normalize(torch.randn(5, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(score_features(real_head.layers, random), 5.236646 + random @ w, rtol=1e-5, atol=1e-5)
    assert sha256(REAL_HEAD) == HEADS["sac"].sha256


def test_the_published_head_scores_pictures_with_a_gradient(real_head, pictures):
    x = tensors(pictures).requires_grad_()
    total = real_head.scores(x).total
    assert ((total > -12.76) & (total < 23.24)).all()
    assert (torch.autograd.grad(total.sum(), x)[0].abs().flatten(1).sum(1) > 0).all()


def test_heads_with_activations_are_told_by_their_keys(tmp_path, pictures):
    tiny.hf_clip(tmp_path, words=True)
    state = tiny.head(places=(0, 3, 6, 9, 11))
    torch.save(state, tmp_path / "ava+logos-l14-reluMSE.pth")
    scorer = Aesthetic("ava_relu", str(tmp_path), str(tmp_path))
    x = F.normalize(torch.randn(6, tiny.WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = x
    for place in (0, 3, 6, 9, 11):
        expected = expected @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
        expected = expected if place == 11 else expected.relu()
    torch.testing.assert_close(score_features(scorer.layers, x), expected[:, 0])


def test_wrong_heads_are_refused(tmp_path):
    tiny.hf_clip(tmp_path, words=True)
    with pytest.raises(RewardError, match="Did you mean 'ava_relu'"):
        Aesthetic("ava_rel")
    torch.save(tiny.head(30), tmp_path / HEADS["sac"].file)
    with pytest.raises(RewardError, match="head for the 24 features"):
        Aesthetic(weights=str(tmp_path), name=str(tmp_path))
    torch.save(tiny.head() | {"layers.9.weight": torch.zeros(1, 1)}, tmp_path / HEADS["sac"].file)
    with pytest.raises(RewardError, match="not those of this scorer"):
        Aesthetic(weights=str(tmp_path), name=str(tmp_path))


def test_v25_reads_siglips_pooled_vector_of_a_squashed_picture(tmp_path, photos):
    scorer = tiny.aesthetic_v25(tmp_path)
    state = torch.load(tmp_path / "aesthetic_predictor_v2_5.pth", weights_only=True)
    assert state["scoring_head.0.weight"].dtype == torch.bfloat16
    model = SiglipVisionModel.from_pretrained(tmp_path).eval()
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    with torch.no_grad():
        x = model(pixel_values=processor(images=photos, return_tensors="pt").pixel_values).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        for place in (0, 2, 4, 6, 8):
            x = x @ state[f"scoring_head.{place}.weight"].float().T + state[f"scoring_head.{place}.bias"].float()
    torch.testing.assert_close(scorer.scores(photos).total, x[:, 0], rtol=1e-4, atol=1e-5)
    torch.save(tiny.head(8, prefix="scoring_head", places=(0, 2, 4, 6, 8)), tmp_path / "other.pth")
    with pytest.raises(RewardError, match="head for the 32 features"):
        AestheticV25(str(tmp_path / "other.pth"), str(tmp_path))


# CLIP-IQA and VLM-RM


def test_clip_iqa_is_a_choice_between_opposites(tmp_path, pictures):
    scorer = tiny.clip_iqa(tmp_path)
    weights = str(tmp_path / "weights.safetensors")
    total = scorer.scores(pictures).total
    swapped = ClipIQA([("Bad photo.", "Good photo.")], weights, "tiny-resnet").scores(pictures).total
    torch.testing.assert_close(swapped, 1 - total, rtol=0, atol=1e-6)
    network, words = scorer.tower.network, open_clip.get_tokenizer("tiny-resnet")
    pixels = v2.functional.normalize(tensors(pictures), CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        network = type(network)(**open_clip.get_model_config("tiny-resnet")).eval()
        network.load_state_dict(load_file(weights))
        network.visual.attnpool.positional_embedding = torch.nn.Parameter(torch.zeros(5, 256))  # 2 x 2 tokens and one
        image = network.encode_image(pixels, normalize=True)
        text = network.encode_text(words(list(PAIRS["paper"][0])), normalize=True)
        expected = (network.logit_scale.exp() * image @ text.T).softmax(1)[:, 0]
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    several = [ClipIQA([pair], weights, "tiny-resnet").scores(pictures).total for pair in PAIRS["pyiqa"]]
    mean = ClipIQA("pyiqa", weights, "tiny-resnet").scores(pictures).total
    torch.testing.assert_close(mean, torch.stack(several).mean(0))


def test_clip_iqa_takes_pictures_as_they_are(tmp_path, pictures):
    scorer = tiny.clip_iqa(tmp_path)
    tile = pictures[0]
    wide = Image.new("RGB", (128, 64))
    wide.paste(tile, (0, 0)), wide.paste(tile, (64, 0))
    assert scorer.scores(wide).total.item() != pytest.approx(scorer.scores(tile).total.item(), rel=1e-6)
    with pytest.raises(RewardError, match="31 pixels"):
        scorer.scores(tile.resize((30, 64)))
    with pytest.raises(RewardError, match="Did you mean 'pyiqa'"):
        ClipIQA("pyiq")


def test_clip_iqa_wants_a_resnet(tmp_path):
    model = tiny.open_clip_model("tiny-hps", tmp_path)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(RewardError, match="CLIP with a ResNet"):
        ClipIQA(weights=str(tmp_path / "w.safetensors"), model="tiny-hps")


def test_vlm_rm_has_its_limits():
    g = torch.Generator().manual_seed(0)
    s, goal, base = (F.normalize(torch.randn(7, 16, generator=g, dtype=torch.float64), dim=-1) for _ in range(3))
    d = F.normalize(goal - base, dim=-1)
    c = ((s - goal) * d).sum(1)
    torch.testing.assert_close(regularised(s, goal, base, 0.0), (s * goal).sum(1))
    torch.testing.assert_close(regularised(s, goal, base, 1.0), 1 - c.square() / 2)
    for alpha in (0.2, 0.7):
        outer = d[:, :, None] * d[:, None, :]
        p = alpha * outer + (1 - alpha) * torch.eye(16, dtype=torch.float64)
        expected = 1 - ((s - goal)[:, None] @ p).square().sum((1, 2)) / 2
        torch.testing.assert_close(regularised(s, goal, base, alpha), expected)
    assert regularised(s, goal, goal, 0.5).isfinite().all()


def test_vlm_rm_scores_prompts_or_a_goal(tmp_path, pictures):
    tiny.hf_clip(tmp_path, words=True)
    name = str(tmp_path)
    prompts = ["a red circle"] * 4
    plain = CLIP(name).scores(pictures, prompts).total
    torch.testing.assert_close(VLMRM("two stars", alpha=0, name=name).scores(pictures, prompts).total, plain)
    named = VLMRM("two stars", goal="a red circle", name=name)
    assert torch.equal(named.scores(pictures).total, VLMRM("two stars", name=name).scores(pictures, prompts).total)
    pair = VLMRM(("two stars", "a square"), goal=["a red circle", "a circle"], name=name).scores(pictures).total
    assert pair.isfinite().all()
    with pytest.raises(RewardError, match="it is the baseline"):
        VLMRM("a red circle", name=name).scores(pictures, prompts)
    for wrong in ({"alpha": 1.5}, {"goal": "an image"}, {"baseline": ""}):
        with pytest.raises(RewardError, match="Expected vlm_rm"):
            VLMRM(name=name, **wrong)


# MPS


def published_mps(state, model, ids, condition, pixels, threshold):
    """The published forward at one prompt a call, from the port's tensors: loops over heads, no shared helpers."""
    cross = {name.removeprefix("mps.cross_model.layers."): value for name, value in state.items() if "cross" in name}
    text = model.text_model(input_ids=ids)
    tokens = model.text_projection(text.last_hidden_state)[0]
    pooled = model.text_projection(text.pooler_output)[0]
    wanted = model.text_projection(model.text_model(input_ids=condition).last_hidden_state)[0]
    relevance = (tokens @ wanted.T).max(1).values
    mask = torch.where(relevance / relevance.max() > threshold, 0.0, -torch.inf)
    x = model.visual_projection(model.vision_model(pixel_values=pixels).last_hidden_state)[0]

    def gated(y):
        one, other = y.chunk(2, -1)
        return other * other.sigmoid() * one

    for n in range(2):
        w = {name.removeprefix(f"{n}."): value for name, value in cross.items() if name.startswith(f"{n}.")}
        y = F.layer_norm(x, x.shape[-1:], w["0.fn.norm.weight"])
        k, v = (tokens @ w["0.fn.to_kv.weight"].T).chunk(2, -1)
        queries = (y @ w["0.fn.to_q.weight"].T).split(8, -1)
        heads = [((q * 8**-0.5) @ k.T + mask).softmax(-1) @ v for q in queries]
        x = x + torch.cat(heads, -1) @ w["0.fn.to_out.weight"].T
        x = x + gated(y @ w["0.fn.ff.0.weight"].T) @ w["0.fn.ff.2.weight"].T
        y = F.layer_norm(x, x.shape[-1:], w["1.fn.norm.weight"])
        q, k, v, ff = (y @ w["1.fn.fused_attn_ff_proj.weight"].T).split([32, 8, 8, 40], -1)
        angle = torch.arange(len(y))[:, None] * w["1.fn.rotary_emb.inv_freq"]
        angle = torch.cat([angle, angle], -1)

        def turn(z, angle=angle):
            return z * angle.cos() + torch.cat([-z[:, 4:], z[:, :4]], -1) * angle.sin()

        heads = [(turn(q) * 8**-0.5 @ turn(k).T).softmax(-1) @ v for q in q.split(8, -1)]
        x = x + torch.cat(heads, -1) @ w["1.fn.attn_out.weight"].T + gated(ff) @ w["1.fn.ff_out.1.weight"].T
    return model.logit_scale.exp() * torch.cosine_similarity(pooled, x[0], dim=0)


@pytest.mark.parametrize("threshold", [0.3, 0.01])
def test_mps_is_the_published_forward_at_one_prompt_a_call(photos, tmp_path, threshold):
    tiny.mps(tmp_path)
    state, model = load_file(tmp_path / "model.safetensors"), tiny.hf_clip(tmp_path / "clip").eval()
    scorer = load_reward(MPS(str(tmp_path), threshold=threshold))
    words = clip_tokenizer()
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    expected = []
    with torch.no_grad():
        for photo, text in zip(photos, TEXTS, strict=True):
            ids, condition = (words(one, **options).input_ids for one in (text, scorer.condition))
            pixels = CLIPImageProcessorPil(**side)(images=photo, return_tensors="pt").pixel_values
            expected.append(published_mps(state, model, ids, condition, pixels, threshold))
    total = scorer.scores(photos, TEXTS).total  # one call: the published code would let them change each other
    torch.testing.assert_close(total, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_mps_has_the_published_architecture():
    """Full size, on no device: names and shapes that the notes on the published checkpoint list."""
    with torch.device("meta"):
        from t2i_align.rewards.mps import CrossAttention, SelfAttention

        cross, own = CrossAttention(1024, 1024, 64, 4096), SelfAttention(1024, 1024, 64, 4096)
    shapes = {name: tuple(value.shape) for name, value in cross.state_dict().items()}
    assert shapes["to_kv.weight"] == (128, 1024)
    assert shapes["ff.0.weight"] == (8192, 1024)
    assert shapes["ff.2.weight"] == (1024, 4096)
    assert tuple(own.fused_attn_ff_proj.weight.shape) == (1024 + 64 + 64 + 8192, 1024)


def test_mps_takes_no_foreign_keys(tmp_path):
    tiny.mps(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"mps.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match="extra"):
        MPS(str(tmp_path))
    del state["mps.cross_model.layers.1.1.fn.attn_out.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RewardError, match="attn_out"):
        MPS(str(tmp_path))


# Subject


def test_subject_is_the_mean_cosine_to_the_references(tmp_path, pictures):
    scorer = tiny.subject(tmp_path)
    path = tmp_path / "reference.png"
    pictures[1].save(path)
    column = (pictures[1], [pictures[1], pictures[2]], str(path), [path])
    total = scorer.scores(pictures, Prompts(("",) * 4, {"reference": column})).total
    features = F.normalize(scorer.extract(tensors(pictures)), dim=-1)
    cosine = features @ features.T
    expected = torch.stack([cosine[0, 1], cosine[1, 1:3].mean(), cosine[2, 1], cosine[3, 1]])
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)
    pictures[2].save(path)
    again = scorer.scores(pictures[2], Prompts(("",), {"reference": (path,)})).total
    assert again.item() == pytest.approx(1, abs=1e-6)  # the file has changed
    with pytest.raises(RewardError, match="an image or a list of images in every row"):
        scorer.scores(pictures[0], Prompts(("",), {"reference": (None,)}))
    with pytest.raises(RewardError, match="prompt columns reference"):
        scorer.scores(pictures[0], "a red circle")


def test_clip_i_shares_the_tower_and_moves_with_it(tmp_path, pictures):
    tiny.hf_clip(tmp_path, words=True)
    scorer = Subject("clip", str(tmp_path))
    assert scorer.extract.tower is CLIP(str(tmp_path)).tower
    table = Prompts(("",), {"reference": (pictures[1],)})
    exact = scorer.scores(pictures[0], table).total
    half = scorer.to(torch.bfloat16)
    assert half.extract.tower.dtype == torch.bfloat16
    torch.testing.assert_close(half.scores(pictures[0], table).total, exact, rtol=0, atol=0.03)
    with pytest.raises(RewardError, match="Did you mean 'dino'"):
        Subject("dina")
    with pytest.raises(RewardError, match="hf download facebook/dino-vits16"):
        Subject()


# Together, and their files


def test_a_sum_of_published_scorers_shares_the_towers_that_are_the_same(tmp_path, pictures):
    folders = {name: tmp_path / name for name in ("clip", "pickscore", "hps")}
    for folder in folders.values():
        folder.mkdir()
    tiny.aesthetic(folders["clip"]), tiny.pickscore(folders["pickscore"]), tiny.hpsv2(folders["hps"], "v2.1")
    hps = {"weights": str(folders["hps"]), "model": "tiny-hps", "size": tiny.SIDE}
    reward = load_reward(
        {
            "pickscore": {"options": {"weights": str(folders["pickscore"])}},
            "hpsv2.1": {"options": hps},
            "clip": {"options": {"name": str(folders["clip"])}},
            "aesthetic": {"options": {"weights": str(folders["clip"]), "name": str(folders["clip"])}},
        }
    )
    scores = reward.scores(pictures, ["a red circle"] * 4)
    assert list(scores.parts) == ["pickscore", "hpsv2.1", "clip", "aesthetic"]
    torch.testing.assert_close(scores.total, sum(scores.parts.values()))
    pick, _, clip, aesthetic = reward.leaves()
    assert clip.tower is aesthetic.tower
    assert pick.tower is not clip.tower
    x = tensors(pictures).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.scores(x, ["a red circle"] * 4).total.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("pickscore", "hf download yuvalkirstain/PickScore_v1 model.safetensors config.json"),
        ("hpsv2", "hf download xswu/HPSv2 HPS_v2_compressed.pt"),
        ("hpsv2.1", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"),
        ("mps", "hf download RE-N-Y/mpsv1 model.safetensors"),
        ("clip_iqa", "hf download timm/resnet50_clip.openai open_clip_model.safetensors"),
        ("subject", "hf download facebook/dino-vits16"),
        ("vlm_rm", "hf download openai/clip-vit-large-patch14"),
        ("aesthetic", "curl -fL --create-dirs -o"),
        ("aesthetic_v2.5", "curl -fL --create-dirs -o"),
    ],
)
def test_missing_weights_are_one_sentence_with_the_command(name, command, tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path))
    with pytest.raises(RewardError, match="cannot be used") as error:
        check_reward(f"tiny_clip + {name}")
    assert f"`{command}" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_a_scorer_lacks_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path))
    for name, base in {
        "aesthetic_v2.5": "google/siglip-so400m-patch14-384",
        "hpsv3": "Qwen/Qwen2-VL-7B-Instruct",
    }.items():
        missing = scorer_class(name).missing()
        assert missing.count("download them with") == 1
        assert missing.endswith(f"&& hf download {base}`.")


def test_weights_off_the_hub_are_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path))
    file = WeightFile("head.pth", url="https://example.org/head.pth", sha256="00")
    assert f"-o '{tmp_path}/weights/head.pth' 'https://example.org/head.pth'" in file.missing()
    assert file.facts()["download"].startswith("curl")
    (tmp_path / "weights").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "weights" / "head.pth")
    assert file.missing() is None
    path = find_weights("", file, "test")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.facts()["sha256"] == f"{digest}, but that of the published file is 00"
    assert file._replace(sha256=digest[:8]).facts()["sha256"] == digest


def test_files_of_one_repository_come_with_one_command():
    files = [WeightFile("a", "o/r"), WeightFile("b", "o/r"), WeightFile("c", "o/s", revision="abc")]
    assert "`hf download o/r a b && hf download o/s c --revision abc`" in missing_files(files)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RewardError, match="could run code"):
        read_weights(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    with pytest.raises(RewardError, match="Cannot read the weights"):
        read_weights(tmp_path / "broken.safetensors")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(RewardError, match="mapping of names to tensors"):
        read_weights(tmp_path / "list.pt")


def test_rewards_show_names_files_and_hashes(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / HEADS["sac"].file
    torch.save(tiny.head(), path)
    code, out, _ = cli("rewards", "show", "aesthetic")
    assert code == 0
    assert f"sha256 {sha256(path)}, but that of the published file is {HEADS['sac'].sha256}" in out
    assert "download hf download openai/clip-vit-large-patch14" in out
    files = json.loads(cli("rewards", "show", "hpsv2.1", "--json")[1])["files"]
    assert files == [
        {
            "file": "xswu/HPSv2/HPS_v2.1_compressed.pt",
            "download": f"hf download xswu/HPSv2 HPS_v2.1_compressed.pt --revision {COMMIT}",
        }
    ]


def test_a_pinned_commit_is_found_whatever_the_cache_calls_main(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = HPSv2.files[0]
    store = tmp_path / "models--xswu--HPSv2"
    for commit in ("a" * 40, COMMIT):
        assert file.missing()
        (store / "snapshots" / commit).mkdir(parents=True)
        (store / "snapshots" / commit / file.file).write_bytes(commit.encode())
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("a" * 40)
    assert file.facts()["commit"] == COMMIT
