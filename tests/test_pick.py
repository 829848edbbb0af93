"""tiny_pick: labels and loss against closed forms, training, the shipped weights, and how proxies are judged."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from t2i_align.config import load_config
from t2i_align.pipelines import load_pipeline
from t2i_align.playground.grammar import parse
from t2i_align.playground.judged import Judged, Style, distinct_prompts, judge_samples
from t2i_align.playground.pick import PickRecipe, train_pick
from t2i_align.playground.proxies import FACTS, agreement, measure_proxy, mistakes
from t2i_align.playground.world import sample_scenes, split_of
from t2i_align.rewards import RewardError, load_reward
from t2i_align.rewards.ensemble import average_weights
from t2i_align.rewards.tiny import CLIP_FOLDER, PICK_FOLDER, TinyPick
from t2i_align.scorer_training.losses import bradley_terry, noisy_labels


@pytest.fixture(scope="module")
def samples():
    """Drawn scenes as if they were samples: of each prompt one true picture and three of other prompts."""
    from t2i_align.rewards.verifier import report

    scenes = list(sample_scenes(24, seed=11))
    pictures = np.stack([np.asarray(scene.render()) for scene in scenes])
    prompts = [str(scene.caption) for scene in scenes]
    pixels = np.stack([pictures[[row, (row + 1) % 24, (row + 2) % 24, (row + 3) % 24]] for row in range(24)])
    gold = [[report(picture, prompt).score for picture in row] for prompt, row in zip(prompts, pixels, strict=True)]
    return Judged(prompts, pixels, np.array(gold, np.float32))


def test_bradley_terry_is_the_log_likelihood_of_the_labels():
    gold = torch.tensor([[1.0, 0.5, 0.5]])
    labels = noisy_labels(gold, 0.0, seed=0)
    assert labels.tolist() == [[[0, 1, 1], [-1, 0, 0], [-1, 0, 0]]]
    loss, pairs = bradley_terry(torch.tensor([[2.0, 0.0, 3.0]]), labels)
    expected = math.log1p(math.exp(-2.0)) + math.log1p(math.exp(1.0))  # -log sigmoid(2) - log sigmoid(-1)
    assert pairs.tolist() == [2]
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_fifth_of_the_labels_is_turned_round_and_always_the_same_ones():
    gold = torch.rand(400, 6, generator=torch.Generator().manual_seed(0))
    labels = noisy_labels(gold, 0.2, seed=3)
    right = noisy_labels(gold, 0.0, seed=3)
    assert torch.equal(labels, -labels.transpose(1, 2))
    turned = (labels * right).triu(1)
    assert (turned < 0).sum() / (turned != 0).sum() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(labels, noisy_labels(gold, 0.2, seed=3))
    assert not torch.equal(labels, noisy_labels(gold, 0.2, seed=4))


def test_agreement_of_known_orders():
    gold = np.array([[0.0, 0.5, 1.0], [0.2, 0.2, 0.2]])
    same = agreement(10 * gold + 3, gold)
    assert same["pairwise"] == 1
    assert same["pearson"] == pytest.approx(1)
    assert same["spearman"] == pytest.approx(1)
    assert (same["pairs"], same["prompts"]) == (3, 1)  # pictures that are equally good say nothing
    assert agreement(-gold, gold)["pairwise"] == 0
    assert agreement(np.ones((2, 3)), gold)["pairwise"] == 0.5
    assert agreement(np.array([[0.0, 2.0, 1.0]]), gold[:1])["pairwise"] == pytest.approx(2 / 3)
    assert agreement(gold, np.ones((2, 3)))["pairwise"] is None


def test_the_verifier_agrees_with_itself(samples):
    table = measure_proxy(load_reward("verifier"), samples)
    assert table["all"]["pairwise"] == 1
    assert table["all"]["pearson"] == pytest.approx(1)
    worst = mistakes(load_reward("verifier"), samples)
    assert all(row["favourite"]["gold"] == row["better"]["gold"] for row in worst)


def test_judged_samples_resume_and_do_not_depend_on_what_was_there(tmp_path):
    pipe, styles = load_pipeline("tiny-sd"), [Style(2, 1.0, 2), Style(2, 1.5, 1)]
    prompts = distinct_prompts(18, 1, "train")
    whole = judge_samples(pipe, prompts, styles, 0, tmp_path / "a")
    assert whole.pixels.shape == (18, 3, 64, 64, 3)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.npz", "00016.npz"]
    before = (tmp_path / "a" / "00000.npz").read_bytes()
    (tmp_path / "a" / "00016.npz").unlink()
    again = judge_samples(pipe, prompts, styles, 0, tmp_path / "a")
    assert (tmp_path / "a" / "00000.npz").read_bytes() == before
    assert (again.pixels == whole.pixels).all()
    assert (again.gold == whole.gold).all()
    fewer = judge_samples(pipe, prompts[:17], styles, 0, tmp_path / "a")  # the second file had two prompts
    assert fewer.pixels.shape == (17, 3, 64, 64, 3)
    assert (judge_samples(pipe, prompts, styles, 0, tmp_path / "a").pixels == whole.pixels).all()
    scores = load_reward("verifier").scores(whole.images(slice(None)).flatten(0, 1), np.repeat(prompts, 3).tolist())
    assert scores.total.tolist() == pytest.approx(whole.gold.ravel().tolist())


def test_prompts_are_different_and_of_their_split():
    prompts = distinct_prompts(50, 0, "heldout")
    assert len(set(prompts)) == 50
    assert {split_of(parse(prompt)) for prompt in prompts} == {"heldout"}


def recipe(*changes):
    words = ["batch=8", "train.steps=30", "train.warmup=0", "train.log_every=5", "train_siblings.steps=40", "noise=0"]
    words += ["train.precision=fp32"]  # most CPUs emulate bf16
    return load_config(PickRecipe, None, [*words, *changes])


def test_training_learns_the_labels_and_resumes_to_the_same_weights(samples, tmp_path):
    settings = recipe("label_noise=0", "train.checkpoint_every=10")
    train_pick(settings, CLIP_FOLDER, samples, tmp_path / "whole")
    scorer = TinyPick(tmp_path / "whole" / "tiny-pick")
    assert measure_proxy(scorer, samples)["all"]["pairwise"] > 0.9

    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "parts" / "checkpoints")
    (tmp_path / "parts" / "checkpoints" / "step-00000030.pt").unlink()
    train_pick(settings, CLIP_FOLDER, samples, tmp_path / "parts", resume=True)
    paused = train_pick(settings, CLIP_FOLDER, samples, tmp_path / "paused", minutes=0)
    assert paused.step == 0
    assert not (tmp_path / "paused" / "tiny-pick").exists()
    train_pick(settings, CLIP_FOLDER, samples, tmp_path / "paused", resume=True)
    for name in ("open_clip_model.safetensors", "siblings.safetensors"):
        every = [(tmp_path / run / "tiny-pick" / name).read_bytes() for run in ("whole", "parts", "paused")]
        assert every[0] == every[1] == every[2]


def test_the_siblings_are_three_and_their_disagreement_is_the_std(samples):
    scorer = load_reward("tiny_pick")
    images, prompts = samples.images(slice(0, 4)).flatten(0, 1), np.repeat(samples.prompts[:4], 4).tolist()
    scores = scorer.scores(images, prompts)
    assert scorer.heads.shape == (3, 128)
    alone = []
    for head in scorer.heads:
        one = TinyPick()
        one.heads = head[None]
        text = one.tower.text_features(prompts)
        alone.append(one.tower.scale * ((one.tower.image_features(images) * text * head).sum(1)))
    torch.testing.assert_close(scores.total, torch.stack(alone).mean(0))
    torch.testing.assert_close(scores.std, torch.stack(alone).std(0))
    assert (scores.std > 0).all()
    for number, expected in enumerate(alone):
        one = load_reward({"pick": {"use": "tiny_pick", "options": {"sibling": number}}}).scores(images, prompts)
        torch.testing.assert_close(one.total, expected)
        assert one.std is None
    with pytest.raises(RewardError, match="0 to 2, but got 3"):
        TinyPick(sibling=3)


def test_the_mean_is_that_of_the_averaged_weights(samples):
    """WARM: of heads that are linear, averaging weights is averaging scores."""
    images, prompts = samples.images(slice(0, 2)).flatten(0, 1), np.repeat(samples.prompts[:2], 4).tolist()
    averaged = average_weights([TinyPick(sibling=number) for number in range(3)])
    torch.testing.assert_close(averaged.scores(images, prompts).total, TinyPick().scores(images, prompts).total)


def test_tiny_pick_is_small_and_prefers_what_the_prompt_says(samples):
    assert sum(path.stat().st_size for path in PICK_FOLDER.iterdir()) < 4.1e6
    assert measure_proxy(load_reward("tiny_pick"), samples)["all"]["pairwise"] > 0.8


def test_the_command_draws_trains_measures_and_writes_a_card(cli, tmp_path):
    words = ["prompts=4", "batch=4", "train.steps=2", "train_siblings.steps=2"]
    code, out, _ = cli("playground", "train", "pick", "--out", tmp_path / "run", *words, "--measure", 3)
    assert code == 0
    assert "tiny-pick" in out
    card = json.loads((tmp_path / "run" / "tiny-pick" / "card.json").read_text())
    table = card["metrics"]["agreement_with_gold"]
    assert set(table) == {"all", "single", "pair", "group", "std", *(f"fact: {sort}" for sort in FACTS)}
    assert len(card["metrics"]["mistakes"]) == 3
    assert card["recipe"]["clip"]
    assert (tmp_path / "run" / "mistakes.png").is_file()


def test_a_missing_clip_is_told(cli, tmp_path):
    code, _, err = cli("playground", "train", "pick", "--out", tmp_path / "run", "--clip", tmp_path / "none")
    assert code != 0
    assert "train that part first" in err
    assert not (tmp_path / "run").exists()
