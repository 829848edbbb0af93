"""VQAScore: the question byte for byte, the answer's probability by hand, the picture's patches, its files."""

import hashlib

import pytest
import torch
from torch.nn import functional as F

from t2i_align.rewards import RewardError, check_reward
from t2i_align.rewards.blip import MEAN
from t2i_align.rewards.vqascore import AFTER, BEFORE, QUESTION, SYSTEM, VQAScore, _to_square
from tests.tiny_vlm import write_vqascore

IMAGES = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "a {red} circle, said the fox"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_vqascore(tmp_path_factory.mktemp("vqa"))


@pytest.fixture(scope="module")
def scorer(folders):
    return VQAScore(**folders, dtype="float32")


def test_the_words_are_the_published_ones():
    assert len(SYSTEM) == 154
    assert hashlib.sha256(SYSTEM.encode()).hexdigest() == (
        "1fa69e2371b762d1882b0bd98d284f312a36c27add732016e12e52586f98a9f5"
    )
    whole = BEFORE + "<image>" + AFTER.format(QUESTION.format("a cat"))
    assert whole.removeprefix(SYSTEM) == (
        ' USER: <image>\nDoes this figure show "a cat"? Please answer yes or no. ASSISTANT: '
    )


@torch.no_grad()
def test_the_score_is_the_root_of_the_answers_probability(scorer):
    """By hand for one picture: both texts end with </s>, the answer is Yes </s>."""
    end, start = 1, 0
    total = scorer.scores(IMAGES, PROMPTS).total
    for row, prompt in enumerate(PROMPTS):
        before, after = scorer.tokenise(BEFORE), scorer.tokenise(AFTER.format(QUESTION.format(prompt)))
        answer = scorer.tokenise("Yes")
        assert before[-1] == after[-1] == answer[-1] == end
        assert len(answer) == 2
        embed = scorer.network.shared
        seen = scorer.projector(scorer.patches(IMAGES[row : row + 1]))[0]
        inputs = torch.cat((embed(before), seen, embed(after)))[None]
        read = scorer.network.encoder(inputs_embeds=inputs).last_hidden_state
        decoder_inputs = torch.tensor([[start, int(answer[0])]])
        written = scorer.network.decoder(input_ids=decoder_inputs, encoder_hidden_states=read).last_hidden_state
        logits = scorer.network.lm_head(written)[0, :, : scorer.words]
        expected = (-F.cross_entropy(logits, answer)).exp()
        torch.testing.assert_close(total[row], expected, rtol=1e-4, atol=0)
    assert (total[0] - total[1]).abs() > 1e-4


def test_the_output_matrix_is_the_checkpoints_and_words_are_held_once(folders, scorer):
    from pathlib import Path

    shards = [torch.load(path, weights_only=True) for path in Path(folders["weights"]).glob("*.bin")]
    saved = {name: value for shard in shards for name, value in shard.items()}
    network = scorer.network
    assert torch.equal(network.lm_head.weight, saved["lm_head.weight"])
    assert torch.equal(network.shared.weight, saved["shared.weight"])
    assert network.encoder.embed_tokens is network.decoder.embed_tokens is network.shared


@torch.no_grad()
def test_patches_come_from_the_layer_before_the_last_without_the_class_token(scorer):
    caught = []
    hook = scorer.eye.encoder.layers[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    patches = scorer.patches(IMAGES)
    hook.remove()
    assert patches.shape == (2, 16, 32)
    assert torch.equal(patches, caught[0][:, 1:])


def test_pictures_are_padded_to_squares_with_clips_mean_colour():
    picture = torch.rand(1, 3, 5, 8)
    square = _to_square(picture)
    assert square.shape == (1, 3, 8, 8)
    assert torch.equal(square[..., 1:6, :], picture)  # three rows: one above, two below
    corner = (255 * square[0, :, 0, 0]).round().int().tolist()
    assert corner == [int(255 * level) for level in MEAN] == [122, 116, 104]
    assert torch.equal(_to_square(picture[..., :5]), picture[..., :5])


@torch.no_grad()
def test_rows_without_a_token_do_not_count(folders, scorer):
    before = scorer.scores(IMAGES, PROMPTS).total
    other = VQAScore(**folders, dtype="float32")
    assert other.network.lm_head.out_features > other.words
    other.network.lm_head.weight[other.words :] += 100
    torch.testing.assert_close(other.scores(IMAGES, PROMPTS).total, before)


def test_the_checkpoints_own_eye_is_used_where_it_has_one(folders, scorer, tmp_path):
    import json
    import shutil
    from pathlib import Path

    weights = shutil.copytree(folders["weights"], tmp_path / "weights")
    eye = {name: value.clone() for name, value in scorer.eye.state_dict().items() if "position_ids" not in name}
    eye["embeddings.class_embedding"] = eye["embeddings.class_embedding"] + 1
    prefix = "vision_tower.vision_tower.vision_model."
    torch.save({prefix + name: value for name, value in eye.items()}, weights / "eye.bin")
    index = json.loads((weights / "pytorch_model.bin.index.json").read_text())
    index["weight_map"] |= {prefix + name: "eye.bin" for name in eye}
    Path(weights / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    own = VQAScore(**{**folders, "weights": str(weights)}, dtype="float32")
    assert torch.equal(own.eye.embeddings.class_embedding, eye["embeddings.class_embedding"])


def test_files_that_are_missing_are_named_before_anything_loads(folders, tmp_path):
    with pytest.raises(RewardError, match="hf download zhiqiulin/clip-flant5-xxl && hf download google/flan-t5-xxl"):
        check_reward("vqascore")
    with pytest.raises(RewardError, match="hf download zhiqiulin/clip-flant5-xl"):
        VQAScore("xl", tokenizer=folders["tokenizer"])
    with pytest.raises(RewardError, match=f"weights={tmp_path} has none of model.safetensors"):
        VQAScore(**{**folders, "weights": str(tmp_path)})
    with pytest.raises(RewardError, match="Did you mean 'xxl'"):
        VQAScore("xxll")
    with pytest.raises(RewardError, match="float32, bfloat16, float16"):
        VQAScore(dtype="int8")


def test_bf16_is_the_default_and_stays_close(folders, scorer):
    rounded = VQAScore(**folders)
    assert rounded.network.dtype == torch.bfloat16
    exact = scorer.scores(IMAGES, PROMPTS).total
    torch.testing.assert_close(rounded.scores(IMAGES, PROMPTS).total, exact, rtol=0.1, atol=0)


def test_a_question_behind_the_context_is_cut(scorer):
    with pytest.warns(UserWarning, match="tokens of the question"):
        assert scorer.scores(IMAGES[:1], "circle " * 3000).total.isfinite().all()
