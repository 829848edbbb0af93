"""HPSv3: the instruction's bytes, the picture's patches and size, positions, the reward token, its files."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from t2i_align.rewards import RewardError, check_reward
from t2i_align.rewards.hpsv3 import BEFORE, PIXELS, HPSv3, patchify, question, smart_size
from t2i_align.rewards.hpsv3_prompt import INSTRUCTION, REWARD, SUFFIX
from tests.tiny_vlm import write_hpsv3

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    write_hpsv3(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(folder):
    return HPSv3(folder, folder, dtype="float32")


def test_the_instruction_is_the_published_one_byte_for_byte():
    assert hashlib.sha256(INSTRUCTION.encode()).hexdigest() == (
        "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"
    )
    whole = INSTRUCTION.format(text_prompt="a cat") + SUFFIX
    assert len(whole) == 2582
    assert hashlib.sha256(whole.encode()).hexdigest() == (
        "58f765b8739946ac474c741df3766ebc3df8c43e966cea2edbdce196c41a2bd4"
    )
    assert question("{a} cat").count("{a} cat") == 1


@pytest.mark.parametrize("size", [(448, 448), (300, 700), (1024, 1024), (31, 77), (64, 64), (768, 1344), (20, 3000)])
def test_sizes_are_those_of_the_published_rule(size):
    assert smart_size(*size) == smart_resize(*size, factor=28, min_pixels=PIXELS, max_pixels=PIXELS)


def test_a_picture_that_is_too_long_is_refused():
    with pytest.raises(RewardError, match="200 times"):
        smart_size(10, 2001)


@pytest.mark.parametrize("size", [(448, 448), (280, 700)])
def test_patches_are_the_librarys(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = Qwen2VLImageProcessor()(images=Image.fromarray(pixels), return_tensors="pt")
    assert theirs.image_grid_thw.tolist() == [[1, size[0] // 14, size[1] // 14]]
    ours = patchify(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(ours[0], theirs.pixel_values, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_score_is_read_at_the_reward_token_with_plain_positions(scorer):
    """By hand: the whole text in one piece, the picture's tokens put where its marks are, positions 0 1 2 ..."""
    prompts = ["a red circle", "a blue square that is somewhat longer"]
    scores = scorer.scores(IMAGES, prompts)
    body = scorer.network
    for row, prompt in enumerate(prompts):
        seen = scorer._see(IMAGES[row : row + 1])[0]
        ids = scorer.tokenise(BEFORE + "<|image_pad|>" * len(seen) + question(prompt))
        mark = scorer.tokenise("<|image_pad|>")
        inputs = body.language_model.embed_tokens(ids)
        inputs[ids == mark] = seen
        axes = {"plain": torch.arange(len(ids)).expand(3, 1, -1)}
        rows, columns = torch.arange(256) // 16, torch.arange(256) % 16
        first = int((ids == mark).nonzero()[0])
        axes["picture"] = axes["plain"].clone()
        axes["picture"][:, 0, first : first + 256] = first + torch.stack((0 * rows, rows, columns))
        values = {}
        for name, positions in axes.items():
            read = body.language_model(inputs_embeds=inputs[None], position_ids=positions, use_cache=False)
            values[name] = scorer.head(read.last_hidden_state[0, int((ids == scorer.reward).nonzero())])
        mu, log_sigma = values["plain"]
        torch.testing.assert_close(scores.total[row], mu, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.std[row], log_sigma.exp(), rtol=1e-4, atol=1e-5)
        assert (values["picture"] - values["plain"]).abs().max() > 1e-4  # the silent mistake would show here


def test_the_std_is_the_scorers_own(scorer):
    assert scorer.scores(IMAGES, "a red circle").std.gt(0).all()


def test_marks_of_the_model_are_no_prompt(scorer):
    for mark in (REWARD, "<|im_end|>", "<|image_pad|>"):
        with pytest.raises(RewardError, match=r"mark of the model's own"):
            scorer.scores(IMAGES, f"a circle {mark}")
    assert scorer.refuse("a <circle> | with |>") is None


def test_files_that_are_missing_or_wrong_are_named(folder, tmp_path):
    with pytest.raises(RewardError, match=r"hf download MizzenAI/HPSv3 HPSv3\.safetensors"):
        check_reward("hpsv3")
    with pytest.raises(RewardError, match="hf download Qwen/Qwen2-VL-7B-Instruct"):
        HPSv3(folder)
    with pytest.raises(RewardError, match="no such file"):
        HPSv3(str(tmp_path), folder)
    from safetensors.torch import load_file, save_file

    state = load_file(f"{folder}/HPSv3.safetensors")
    save_file({**state, "rm_head.7.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(RewardError, match=r"unexpected 7\.weight"):
        HPSv3(str(tmp_path / "more.safetensors"), folder)
    del state["visual.merger.ln_q.weight"]
    save_file(state, tmp_path / "fewer.safetensors")
    with pytest.raises(RewardError, match=r"missing visual\.merger\.ln_q\.weight"):
        HPSv3(str(tmp_path / "fewer.safetensors"), folder)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].clone()
    save_file(state, tmp_path / "rows.safetensors")
    with pytest.raises(RewardError, match="a row for each of"):
        HPSv3(str(tmp_path / "rows.safetensors"), folder)


def test_bf16_is_the_default_with_a_head_of_fp32(folder, scorer):
    rounded = HPSv3(folder, folder)
    assert rounded.network.dtype == torch.bfloat16
    assert rounded.head[0].weight.dtype == torch.float32
    exact = scorer.scores(IMAGES[:1], "a red circle").total
    torch.testing.assert_close(rounded.scores(IMAGES[:1], "a red circle").total, exact, rtol=0, atol=0.05)
