"""CLIP towers and scorers: numbers against both libraries, sharing, caching, gradients, and the shipped tiny_clip."""

import json
import shutil
import warnings

import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from t2i_align.config import load_config
from t2i_align.data.images import pil_to_tensor
from t2i_align.pipelines import load_pipeline
from t2i_align.playground.clip import CLIPRecipe, ContrastiveTraining, Tokens, clip_config, save_clip, train_clip
from t2i_align.playground.data import ScenePool
from t2i_align.playground.judged import distinct_prompts
from t2i_align.playground.tokenizer import build_tokenizer
from t2i_align.playground.world import sample_scenes
from t2i_align.rewards import RewardError, encoders, load_reward
from t2i_align.rewards.checkpoints import load_tower, missing_weights
from t2i_align.rewards.clip import CLIP, TowerScorer
from t2i_align.rewards.tiny import CLIP_FOLDER, TinyCLIP
from t2i_align.rewards.tower import TOWERS, Preprocessing, TowerSpec
from t2i_align.training import Ctx

PROMPTS = ["a red circle", "two green stars", "a red circle"]


@pytest.fixture(scope="module")
def pictures():
    return [scene.render() for scene in sample_scenes(3, seed=5)]


@pytest.fixture(scope="module")
def images(pictures):
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A transformers CLIPModel with random weights, 32x32 pictures."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 185, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """An open_clip model with random weights."""
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    config = clip_config(8, len(build_tokenizer()))
    save_clip(open_clip.model.CLIP(**config["model_cfg"]), config, folder)
    return folder


def test_tiny_clip_opens_with_stock_open_clip_and_gives_the_same_score(pictures):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP_FOLDER}")
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP_FOLDER}")(PROMPTS)
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        expected = (image * model.encode_text(tokens, normalize=True)).sum(1)
    torch.testing.assert_close(load_reward("tiny_clip").scores(pictures, PROMPTS).total, expected, rtol=1e-4, atol=1e-5)


def test_tiny_clip_is_small_and_knows_the_words():
    assert sum(path.stat().st_size for path in CLIP_FOLDER.iterdir()) < 4.1e6
    config = json.loads((CLIP_FOLDER / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["vocab_size"] <= 300
    longest = max((len(tokens.nonzero()) for tokens in Tokens()(distinct_prompts(300, 0, "train"))), default=0)
    assert longest <= config["model_cfg"]["text_cfg"]["context_length"]


def test_remembered_texts_do_not_depend_on_who_asks_first():
    tower = load_reward("tiny_clip").tower
    with torch.autocast("cpu", torch.bfloat16):
        under = tower.text_features(["three red stars"])
    tower.texts.clear()
    assert torch.equal(under, tower.text_features(["three red stars"]))


def test_tiny_clip_tells_captions_apart():
    from t2i_align.playground.proxies import measure_captions

    assert measure_captions(load_reward("tiny_clip"), scenes=60)["all"]["right"] > 0.85


def test_transformers_scores_are_the_librarys_own(hf_folder, pictures):
    model, processor = CLIPModel.from_pretrained(hf_folder).eval(), CLIPImageProcessor.from_pretrained(hf_folder)
    tokeniser = build_tokenizer()
    ids = tokeniser(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(pixel_values=processor(images=pictures, return_tensors="pt").pixel_values, input_ids=ids)
    expected = (output.image_embeds * output.text_embeds).sum(1)
    torch.testing.assert_close(CLIP(str(hf_folder)).scores(pictures, PROMPTS).total, expected, rtol=0, atol=2e-3)


def test_open_clip_and_transformers_agree_on_one_set_of_weights(pictures, tmp_path):
    """An open_clip ViT converted to transformers by hand scores alike: pooling, activation, projection, padding."""
    torch.manual_seed(0)
    config = clip_config(8, 185)
    tower = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = config["model_cfg"]["text_cfg"] | {"width": 32, "heads": 2}
    config["model_cfg"] |= {"quick_gelu": True, "embed_dim": 24, "vision_cfg": tower, "text_cfg": text}
    model = open_clip.model.CLIP(**config["model_cfg"])
    save_clip(model.half().float(), config, tmp_path / "open_clip")
    _convert(model, tmp_path / "hf")
    one = CLIP(f"local-dir:{tmp_path / 'open_clip'}").scores(images := [p.resize((32, 32)) for p in pictures], PROMPTS)
    mean, std = (0.5,) * 3, (0.25,) * 3
    other = _with_preprocessing(tmp_path / "hf", Preprocessing((32, 32), mean, std)).scores(images, PROMPTS)
    torch.testing.assert_close(one.total, other.total, rtol=0, atol=1e-4)


def _with_preprocessing(folder, preprocessing):
    scorer = CLIP(str(folder))
    scorer._hold(load_tower(TowerSpec(str(folder), preprocessing=preprocessing)))
    return scorer


def _convert(model, folder):
    shape = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape["hidden_act"] = "quick_gelu"
    words = {**shape, "vocab_size": 185, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    hf = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=24))
    layers = {"text_model": model.transformer, "vision_model": model.visual.transformer}
    state = {
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "text_projection.weight": model.text_projection.T,
        "vision_model.embeddings.class_embedding": model.visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": model.visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": model.visual.positional_embedding,
        "visual_projection.weight": model.visual.proj.T,
        "logit_scale": model.logit_scale,
    }
    norms = {"text_model.final_layer_norm": model.ln_final, "vision_model.pre_layrnorm": model.visual.ln_pre}
    norms["vision_model.post_layernorm"] = model.visual.ln_post
    for part, transformer in layers.items():
        for n, block in enumerate(transformer.resblocks):
            name = f"{part}.encoder.layers.{n}"
            norms |= {f"{name}.layer_norm1": block.ln_1, f"{name}.layer_norm2": block.ln_2}
            norms |= {f"{name}.mlp.fc1": block.mlp.c_fc, f"{name}.mlp.fc2": block.mlp.c_proj}
            norms[f"{name}.self_attn.out_proj"] = block.attn.out_proj
            weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
            for what, weight, bias in zip("qkv", weights, biases, strict=True):
                state |= {f"{name}.self_attn.{what}_proj.weight": weight, f"{name}.self_attn.{what}_proj.bias": bias}
    for name, module in norms.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    hf.load_state_dict({name: value.detach().contiguous() for name, value in state.items()}, strict=True)
    hf.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def test_variants_are_what_their_names_say(hf_folder, pictures):
    cosine, x100, clipscore = (
        CLIP(str(hf_folder), variant=name).scores(pictures, PROMPTS).total for name in ("cosine", "x100", "clipscore")
    )
    torch.testing.assert_close(x100, 100 * cosine)
    torch.testing.assert_close(clipscore, 2.5 * cosine.clamp(min=0))
    with pytest.raises(RewardError, match="Did you mean 'cosine'"):
        CLIP(str(hf_folder), variant="cosin")


def test_a_prefix_is_put_before_the_prompt(hf_folder, pictures):
    plain, prefixed = CLIP(str(hf_folder)), CLIP(str(hf_folder), prefix="two ")
    expected = plain.scores(pictures, ["two " + prompt for prompt in PROMPTS]).total
    assert torch.equal(prefixed.scores(pictures, PROMPTS).total, expected)


@pytest.mark.parametrize(
    ("resize", "size", "corner"),
    [("shortest", (64, 32), 1.0), ("longest", (64, 32), 0.5), ("squash", (64, 32), 1.0), ("longest", (31, 77), 0.5)],
)
def test_every_resize_gives_the_networks_size(resize, size, corner):
    how = Preprocessing((24, 24), (0.0,) * 3, (1.0,) * 3, resize, fill=0.5)
    image = torch.ones(1, 3, *size)
    assert how(image).shape == (1, 3, 24, 24)
    assert how(image)[0, 0, 0, 0].item() == pytest.approx(corner)
    assert how(image)[0, 0, 12, 12].item() == pytest.approx(1)


def test_preprocessing_matches_the_pil_path_of_open_clip():
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    size, mean, std = (32, 32), (0.5,) * 3, (0.25,) * 3
    cfg = open_clip.transform.PreprocessCfg(size=size, mean=mean, std=std, interpolation="bicubic")
    theirs = open_clip.transform.image_transform_v2(cfg, is_train=False)(picture)
    ours = Preprocessing(size, mean, std)(pil_to_tensor(picture)[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)  # 8-bit rounding: 1/255 over a std of 0.25


def test_scorers_on_the_same_weights_share_one_module(open_clip_folder):
    name = f"local-dir:{open_clip_folder}"
    one, other = CLIP(name), CLIP(name, variant="x100", label="again")
    assert one.tower is other.tower
    one.to(torch.bfloat16)
    assert one.tower.dtype == torch.bfloat16
    assert other.tower.dtype == torch.float32  # moving one scorer leaves the others alone
    assert other.to(torch.bfloat16).tower is one.tower
    assert list(one.parameters()) == []
    del one, other
    assert not [spec for spec, *_ in TOWERS if spec.name == name]


class Counting(TowerScorer):
    """Mean of the image embedding; counts how often towers run."""

    name, needs_prompt = "counting", False

    def forward(self, images, prompts):
        return self.tower.image_features(images).mean(1)


def count_calls(tower, monkeypatch):
    calls = {"image": 0, "text": []}
    image, tokenise = tower.encode_image, tower.tokenise

    def encode_image(network, pixels):
        calls["image"] += 1
        return image(network, pixels)

    def counted(texts):
        calls["text"] += texts
        return tokenise(texts)

    monkeypatch.setattr(tower, "encode_image", encode_image)
    monkeypatch.setattr(tower, "tokenise", counted)
    return calls


@pytest.mark.parametrize("graph", [False, True])
def test_a_sum_runs_the_shared_tower_once(open_clip_folder, images, monkeypatch, graph):
    from t2i_align.rewards import WeightedSum

    name = f"local-dir:{open_clip_folder}"
    scorer = WeightedSum([(1.0, CLIP(name)), (0.5, Counting(TowerSpec(name)))])
    alone = CLIP(name).scores(images, PROMPTS).total + 0.5 * Counting(TowerSpec(name)).scores(images).total
    calls = count_calls(CLIP(name).tower, monkeypatch)
    x = images.clone().requires_grad_(graph)
    total = scorer.scores(x, PROMPTS).total
    assert calls["image"] == 1
    torch.testing.assert_close(total, alone)
    if graph:
        (both,) = torch.autograd.grad(total.sum(), x)
        (first,) = torch.autograd.grad(CLIP(name).scores(x, PROMPTS).total.sum(), x)
        (second,) = torch.autograd.grad(Counting(TowerSpec(name)).scores(x).total.sum(), x)
        torch.testing.assert_close(both, first + 0.5 * second)


def test_kept_features_are_never_stale(open_clip_folder, images):
    tower = load_tower(TowerSpec(f"local-dir:{open_clip_folder}"))
    x = images.clone()
    kept = tower.image_features(x)
    assert tower.image_features(x) is kept
    x.mul_(0.5)
    assert not torch.allclose(tower.image_features(x), kept)
    x.requires_grad_()
    with torch.no_grad():
        without = tower.image_features(x)
    with_graph = tower.image_features(x)
    assert (without.requires_grad, with_graph.requires_grad) == (False, True)
    with_graph.sum().backward()
    tower.image_features(x).sum().backward()  # the first graph is used up; a new one must have been built
    del x, with_graph
    other = torch.rand(3, 3, 64, 64)
    assert torch.equal(tower.image_features(other), tower._encode_images(other))
    del other
    assert tower.seen is None


def test_features_made_in_inference_mode_serve_later_gradients(open_clip_folder, images):
    scorer = CLIP(f"local-dir:{open_clip_folder}")
    with torch.inference_mode():
        expected = scorer.scores(images.clone(), PROMPTS).total
    x = images.clone().requires_grad_()
    total = scorer.scores(x, PROMPTS).total
    torch.testing.assert_close(total.detach(), expected.clone())
    assert torch.autograd.grad(total.sum(), x)[0].abs().sum() > 0


def test_each_text_is_encoded_once(open_clip_folder, images, monkeypatch):
    scorer = CLIP(f"local-dir:{open_clip_folder}")
    calls = count_calls(scorer.tower, monkeypatch)
    scorer.scores(images.repeat(4, 1, 1, 1), PROMPTS * 4, batch_size=2)
    assert sorted(calls["text"]) == sorted(set(PROMPTS))


def test_a_text_that_is_cut_is_warned_of_and_a_short_one_is_not(open_clip_folder, pictures):
    scorer = CLIP(f"local-dir:{open_clip_folder}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.scores(pictures, PROMPTS)
    with pytest.warns(UserWarning, match="reads 16 tokens"):
        scorer.scores(pictures[0], "a red circle " * 9)


def test_bf16_stays_close(open_clip_folder, pictures):
    name = f"local-dir:{open_clip_folder}"
    exact = CLIP(name).scores(pictures, PROMPTS).total
    torch.testing.assert_close(CLIP(name).to(torch.bfloat16).scores(pictures, PROMPTS).total, exact, rtol=0, atol=0.03)


def test_openai_weights_never_meet_exact_gelu(monkeypatch, tmp_path):
    """Plain open_clip names build GELU around OpenAI's QuickGELU weights and only warn; here they are corrected."""
    made = {}
    weights = tmp_path / "weights.safetensors"

    def create_model(name, pretrained, force_quick_gelu, **options):
        made["quick"] = force_quick_gelu
        raise RuntimeError("no network in tests")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for name, tag, quick in (
        ("ViT-L-14", "openai", True),
        ("ViT-L-14-quickgelu", "openai", True),
        ("ViT-H-14", "laion2b_s32b_b79k", False),
        ("ViT-L-14", str(weights), False),
    ):
        with pytest.raises(RewardError, match="no network"):
            load_tower(TowerSpec(name, tag))
        assert made["quick"] is quick


def test_gelu_weights_under_a_quickgelu_name_are_refused(monkeypatch):
    from open_clip import pretrained

    monkeypatch.setitem(pretrained._PRETRAINED, "ViT-B-32-quickgelu", {"made_up": {"url": "none", "quick_gelu": False}})
    with pytest.raises(RewardError, match="use the name without -quickgelu"):
        load_tower(TowerSpec("ViT-B-32-quickgelu", "made_up"))


def test_missing_weights_are_told_with_the_download_command(tmp_path, monkeypatch):
    assert "hf download nobody/nothing" in missing_weights("nobody/nothing")
    assert missing_weights(str(tmp_path)) is None
    with pytest.raises(RewardError, match="hf download nobody/nothing"):
        CLIP("nobody/nothing")
    with pytest.raises(RewardError, match="Cannot open the CLIP"):
        CLIP(str(tmp_path))
    with pytest.raises(RewardError, match="Cannot open the CLIP"):
        CLIP("local-dir:no/such/folder")
    with pytest.raises(RewardError, match="neither a folder nor a hub id"):
        CLIP("a/b/c")


def small(*changes):
    words = ["scenes=64", "decoded=0.2", "batch=16", "width=8", "train.steps=6", "train.log_every=2", *changes]
    return load_config(CLIPRecipe, None, [*words, "train.checkpoint_every=3"])


def test_training_writes_a_folder_that_opens_and_resumes_to_the_same_weights(tmp_path):
    vae = load_pipeline("tiny-sd").vae
    train_clip(small(), vae, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "parts" / "checkpoints")
    (tmp_path / "parts" / "checkpoints" / "step-00000006.pt").unlink()
    train_clip(small(), vae, tmp_path / "parts", resume=True)
    made = [tmp_path / run / "tiny-clip" for run in ("whole", "parts")]
    weights = [(folder / "open_clip_model.safetensors").read_bytes() for folder in made]
    assert weights[0] == weights[1]
    assert TinyCLIP(folder=made[0]).scores(torch.rand(2, 3, 64, 64), "a red circle").total.shape == (2,)


def test_captions_that_are_true_of_another_picture_are_no_negatives():
    pool, recipe = ScenePool(40, seed=0), small("noise=0")
    method = ContrastiveTraining(torch.nn.Identity(), pool, recipe)
    rows = torch.arange(40)
    images, tokens, true = method.collect(Ctx(0, 0, torch.device("cpu")), rows)
    assert images.shape == (40, 3, 64, 64)
    assert tokens.shape == (40 * 3, 16)
    assert true[rows, rows].all()
    assert not true[rows, rows + 40].any()  # one fact of each is false of its own picture
    assert not true[rows, rows + 80].any()
    shared = [(row, other) for row, other in true[:, :40].nonzero().tolist() if row != other]
    descriptions = [{str(caption) for caption in scene.descriptions()} for scene in pool.scenes]
    assert shared
    assert all(descriptions[row] & descriptions[other] for row, other in shared)


def test_the_command_trains_refuses_an_old_folder_and_goes_on(cli, tmp_path):
    words = ["scenes=64", "decoded=0", "batch=8", "width=8", "train.steps=4", "train.checkpoint_every=2"]
    command = ["playground", "train", "clip", "--out", tmp_path / "run", *words, "--measure", 0]
    code, out, _ = cli(*command, "--minutes", 0)
    assert code == 0
    assert "tiny-clip" in out
    card = json.loads((tmp_path / "run" / "tiny-clip" / "card.json").read_text())
    assert card["steps"] == 0
    code, _, err = cli(*command)
    assert code != 0
    assert "--resume" in err
    assert cli(*command, "--resume")[0] == 0
    card = json.loads((tmp_path / "run" / "tiny-clip" / "card.json").read_text())
    assert card["steps"] == 4
    assert card["recipe"]["vae"]
    code, _, err = cli(*command, "--resume", "batch=9")
    assert code != 0
    assert "batch" in err


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_open_clip_features_are_the_librarys_own(pool):
    """Cut texts and a last block for one token change nothing but rounding, nor do gradients to the pixels."""
    import open_clip

    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=3, width=64, head_width=16, patch_size=8, image_size=32, pool_type=pool)
    text = open_clip.CLIPTextCfg(context_length=20, vocab_size=50, width=32, heads=2, layers=2)
    network = open_clip.CLIP(16, vision, text).eval().requires_grad_(False)
    pixels = torch.rand(3, 3, 32, 32, requires_grad=True)
    tokens = torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate((2, 9, 20)):
        tokens[row, : length - 1] = torch.randint(1, 49, (length - 1,))
        tokens[row, length - 1] = 49
    ours, theirs = encoders.open_clip_image(network, pixels), network.encode_image(pixels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(made.square().sum(), pixels)[0] for made in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    for rows in (slice(0, 2), slice(0, 3)):
        found, expected = encoders.open_clip_text(network, tokens[rows]), network.encode_text(tokens[rows])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_text_s_features_do_not_depend_on_which_others_are_new():
    texts = [str(scene.caption) for scene in ScenePool(6, seed=1).scenes]
    tower = CLIP(f"local-dir:{CLIP_FOLDER}").tower
    tower.texts.clear()
    together = tower.text_features(texts)
    tower.texts.clear()
    alone = torch.cat([tower.text_features([text]) for text in reversed(texts)]).flip(0)
    assert torch.equal(together, alone)
