"""ImageReward and CycleReward: key names, head, what of a prompt is read, files that are missing or unsafe."""

import pickle
import re
import sys
import types

import pytest
import torch
from torch import nn

from benchmarks.parity.inputs import HEADS, blip_shapes
from t2i_align.prompts import Prompts
from t2i_align.rewards import RewardError, check_reward, load_reward
from t2i_align.rewards.blip import _rename
from t2i_align.rewards.cyclereward import CycleReward
from t2i_align.rewards.image_reward import MEAN, SD, ImageReward
from tests.tiny_vlm import blip_state, write_blip

FILES = {"image_reward": (ImageReward, "ImageReward.pt"), "cyclereward": (CycleReward, "CycleReward-Combo.pth")}
IMAGES = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FILES)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    kind, file = FILES[request.param]
    return kind(write_blip(folder, request.param, file)), folder, file


def test_every_published_key_has_a_place_of_its_own():
    shapes = blip_shapes()
    assert len(shapes) == len({_rename(name) for name in shapes})
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(447e6, rel=0.01)


def test_a_key_too_many_too_few_or_of_another_shape_is_named(made):
    scorer, folder, _ = made
    state = blip_state(scorer.name)
    changes = {
        "missing text.encoder.layer.1.output.dense.bias": {"blip.text_encoder.encoder.layer.1.output.dense.bias": None},
        "unexpected blip.itm_head.weight": {"blip.itm_head.weight": torch.zeros(2)},
        "vision.post_layernorm.weight (3,) instead of (64,)": {"blip.visual_encoder.norm.weight": torch.zeros(3)},
    }
    for said, change in changes.items():
        broken = {name: value for name, value in (state | change).items() if value is not None}
        torch.save(broken, folder / "broken.pt")
        with pytest.raises(RewardError, match=re.escape(said)):
            type(scorer)(str(folder / "broken.pt"), str(folder))


def test_projections_and_position_ids_are_the_only_keys_that_are_left_out():
    names = blip_state("image_reward")
    from t2i_align.rewards.blip import UNUSED

    assert {name.split(".")[1] for name in names if UNUSED.fullmatch(name)} == {
        "vision_proj",
        "text_proj",
        "text_encoder",
    }


def test_image_rewards_head_is_one_affine_map(made):
    scorer, _, _ = made
    layers = [layer for layer in scorer.network.head if isinstance(layer, nn.Linear)]
    weight, bias = torch.eye(layers[0].in_features), torch.zeros(layers[0].in_features)
    for layer in layers:
        weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
    x = torch.randn(5, len(weight.T), generator=torch.Generator().manual_seed(0))
    same = torch.allclose(scorer.network.head(x), x @ weight.T + bias, atol=1e-5)
    assert same == (scorer.name == "image_reward")


def test_the_score_is_what_the_docstring_says(made):
    scorer, _, _ = made
    raw = scorer.network(IMAGES, ["a red circle"] * 2)
    expected = (raw - MEAN) / SD if scorer.name == "image_reward" else raw
    torch.testing.assert_close(scorer.scores(IMAGES, "a red circle").total, expected)


def test_the_prompt_is_read_in_both_directions_and_from_cls(made):
    scorer, _, _ = made
    tokens = scorer.network.tokens(["a red circle"]).input_ids[0].tolist()
    assert scorer.network.tokenise.convert_ids_to_tokens(tokens[:1]) == ["[CLS]"]
    one, other = (scorer.scores(IMAGES, prompt).total for prompt in ("a red circle", "a red square"))
    assert (one - other).abs().min() > 1e-4  # behind a causal mask [CLS] would see no word


def test_only_the_published_number_of_tokens_is_read(made):
    scorer, _, _ = made
    context = scorer.network.context
    assert context == {"image_reward": 35, "cyclereward": 128}[scorer.name]
    start = "red " * (context - 2)  # one token a word, [CLS] and [SEP]
    with pytest.warns(UserWarning, match=f"first {context} tokens"):
        long = scorer.scores(IMAGES, start + "blue").total
    torch.testing.assert_close(scorer.scores(IMAGES, start).total, long)
    shorter = scorer.scores(IMAGES, "red " * (context - 3) + "blue").total
    assert (shorter - long).abs().max() > 1e-4


def test_bf16_stays_close(made):
    scorer, folder, file = made
    exact = scorer.scores(IMAGES, "a red circle").total
    rounded = type(scorer)(str(folder)).to(torch.bfloat16).scores(IMAGES, "a red circle").total
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03)  # 8 bits through 2 + 2 layers and a head


def test_nothing_is_loaded_before_all_files_are_found(made, tmp_path, monkeypatch):
    scorer, _, file = made
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / file).write_bytes(b"no weights at all")
    with pytest.raises(
        RewardError,
        match=r"download them with `hf download google-bert/bert-base-uncased vocab.txt --revision 86b5e093",
    ):
        type(scorer)(str(tmp_path))
    with pytest.raises(RewardError, match="no such file"):
        type(scorer)(str(tmp_path / "nowhere.pt"))
    command = (
        "hf download THUDM/ImageReward" if scorer.name == "image_reward" else "CycleReward-Combo.pth' 'https://github"
    )
    with pytest.raises(RewardError, match=re.escape(command)):
        check_reward(scorer.name)


def test_local_weights_are_named_in_a_block(made):
    scorer, folder, _ = made
    block = {"mine": {"use": scorer.name, "options": {"weights": str(folder)}}}
    scores = load_reward(block).scores(IMAGES, "a red circle")
    torch.testing.assert_close(scores.total, scorer.scores(IMAGES, "a red circle").total)


def test_a_file_that_would_run_code_is_refused(made):
    scorer, folder, _ = made
    (folder / "unsafe.pt").write_bytes(pickle.dumps({"blip": print}))
    with pytest.raises(RewardError, match=r"run code|Cannot read"):
        type(scorer)(str(folder / "unsafe.pt"), str(folder))


def test_a_vocabulary_of_another_model_is_refused(made):
    scorer, folder, _ = made
    (folder / "words").mkdir(exist_ok=True)
    (folder / "words" / "vocab.txt").write_text("\n".join(f"[word{n}]" for n in range(500)))
    with pytest.raises(RewardError, match="at most 400 tokens"):
        type(scorer)(str(folder), str(folder / "words"))


def test_the_package_backend_says_what_is_wrong_with_the_package(tmp_path):
    write_blip(tmp_path, "image_reward", "ImageReward.pt")
    with pytest.raises(RewardError, match=r"med_config\.json"):
        ImageReward(str(tmp_path), backend="package")
    (tmp_path / "med_config.json").write_text("{}")
    with pytest.raises(RewardError, match="leave the option out"):
        ImageReward(str(tmp_path), backend="package")
    with pytest.raises(RewardError, match="Did you mean 'package'"):
        ImageReward(str(tmp_path), backend="packages")


def test_the_package_backend_answers_where_the_images_are(tmp_path, monkeypatch):
    """The package itself returns Python numbers."""
    write_blip(tmp_path, "image_reward", "ImageReward.pt")
    (tmp_path / "med_config.json").write_text("{}")
    network = types.SimpleNamespace(score=lambda text, image: 0.5)
    package = types.SimpleNamespace(load=lambda *args, **options: network)
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    scorer = ImageReward(str(tmp_path), backend="package")
    monkeypatch.setattr("t2i_align.rewards.image_reward.tensor_to_pil", lambda image: image)
    scores = scorer(torch.zeros(2, 3, 4, 4, device="meta"), Prompts(("a", "b")))
    assert (scores.device.type, scores.shape) == ("meta", (2,))
    assert network.device.type == "meta"


def test_variants_of_cyclereward_are_files_of_their_own(tmp_path):
    folder = write_blip(tmp_path, "cyclereward", "CycleReward-I2T.pth")
    assert CycleReward(folder, variant="I2T").scores(IMAGES, Prompts(("a", "b"))).total.isfinite().all()
    with pytest.raises(RewardError, match=r"CycleReward-T2I\.pth"):
        CycleReward(folder, variant="T2I")
    with pytest.raises(RewardError, match="Did you mean 'T2I'"):
        CycleReward(folder, variant="T2")


def test_heads_sit_where_the_files_have_them():
    assert HEADS == {"image_reward": (0, 2, 4, 6, 7), "cyclereward": (0, 2, 4, 6, 8)}
