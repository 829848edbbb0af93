"""Parrot: tokens of rewards, selection by each, prompts that a language model expands and learns to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from t2i_align.config import ConfigError, TrainConfig
from t2i_align.methods import read_method
from t2i_align.methods.base import Tools
from t2i_align.methods.expansion import Expander, ExpandSettings, expansion_advantage
from t2i_align.methods.policy_gradient import PolicyGradient, signed_parts, survivors
from t2i_align.pipelines.driver import Driver
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.rewards.base import Scores
from t2i_align.training import Ctx, TrainingError, fit
from t2i_align.training.run import train
from tests.families import FAMILIES
from tests.test_run import CONFIG

WORDS = ["red", "blue", "shiny", "flat", "a", "0.1", "0.2", "0.3"]
REWARD = "tests.test_run:Red - 2 * tests.test_run:Blue"


def red(images, prompts):
    assert not any("<" in text for text in prompts)  # scorers read the prompt alone
    return images[:, 0].mean((1, 2))


def blue(images, prompts):
    return images[:, 2].mean((1, 2))


red.__name__, blue.__name__ = "red", "blue"


def make(name="grpo", **settings):
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    found, options = read_method({"use": name, "group": 4, "steps": 2, "batch_size": 8, "select": "pareto"} | settings)
    reward = FunctionScorer(red) - 2 * FunctionScorer(blue)
    return found(options, Policy.lora(pipe, rank=2), Tools(Driver(pipe), reward))


def context(step=0):
    return Ctx(0, step, torch.device("cpu"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A language model with random weights, on disk as transformers writes it."""
    folder = tmp_path_factory.mktemp("writer")
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return str(folder)


def test_survivors_by_hand_and_by_sign():
    values = torch.tensor([[1.0, 3], [2, 2], [3, 1], [1, 1], [2, 2]])
    assert survivors(values, 5).tolist() == [1, 1, 1, 0, 1]
    parts = {"red": values[:, 0], "blue": values[:, 1]}
    reward = FunctionScorer(red) - 2 * FunctionScorer(blue)
    signed = signed_parts(reward, Scores(values[:, 0], parts))
    assert signed.tolist() == [[1, -3], [2, -2], [3, -1], [1, -1], [2, -2]]
    assert survivors(signed, 5).tolist() == [0, 0, 1, 0, 0]  # red and little blue: the third beats all


@pytest.mark.parametrize("name", ["grpo", "ddpo"])
def test_tokens_say_which_reward_a_prompt_serves(name):
    method = make(name, tokens="<reward {k}>", clip=0.2)
    prompts = Prompts.of(["a", "b", "c"])
    assert method.labelled(context(), prompts, 3).text == ("<reward 1> a", "<reward 2> b", "<reward 1> c")
    assert method.labelled(context(1), prompts, 3).text == ("<reward 2> a", "<reward 1> b", "<reward 2> c")
    assert method.labelled(context(), prompts[1:], 3, 1).text == ("<reward 2> b", "<reward 1> c")
    assert method.as_used(prompts).text[0] == "<reward 1> <reward 2> a"
    data, advantages = method.collect(context(), prompts[:2])
    assert data.traj.cond.prompts.text[::4] == ("<reward 1> a", "<reward 2> b")
    parts = data.scores.parts
    served = torch.cat([parts["red"][:4], -parts["blue"][4:]])
    torch.testing.assert_close(data.scores.total, served)
    kept = survivors(torch.stack([parts["red"], -parts["blue"]], 1), 4).bool()
    assert 0 < kept.sum() < 8
    assert not advantages[~kept].any()
    assert (advantages == advantages[:, :1]).all()  # of all steps alike
    for group in (slice(0, 4), slice(4, 8)):  # the best by its own reward always survives
        assert advantages[group, 0].argmax() == served[group].argmax()
        assert advantages[group].max() > 0
    terms = list(method.losses(context(), (data, advantages)))
    assert all((term.stats["ratio"] == 1).all() for term in terms)


def test_tokens_that_the_encoder_cannot_tell_apart_are_refused(monkeypatch):
    monkeypatch.setattr(PolicyGradient, "token", lambda self, k: "same")
    with pytest.raises(TrainingError, match="reads 'same' and 'same' alike"):
        make(tokens="<reward {k}>")


def test_what_is_written_is_drawn_by_its_probability_and_keyed(writer):
    expander = Expander(ExpandSettings(use=writer, tokens=1, rank=2))
    prompt = Prompts.of("0.1 red")
    draws = [expander.expand(prompt, 0, step).columns["expansion"][0] for step in range(300)]
    read = draws[0][0]
    counts = torch.bincount(torch.tensor([drawn[0] for _, drawn in draws]), minlength=10) / len(draws)
    with torch.no_grad():
        chances = torch.stack([expander.log_prob(read, (token,)) for token in range(10)]).exp()
    assert float(chances.sum()) == pytest.approx(1, abs=1e-5)
    # 4 standard errors of a share
    assert ((counts - chances).abs() <= 4 * (chances * (1 - chances) / len(draws)).sqrt() + 1e-9).all()
    longer = Expander(ExpandSettings(use=writer, tokens=6, rank=2))
    both = longer.expand(Prompts.of(["0.1", "0.2 blue"]), 3, 5, first=4)
    alone = longer.expand(Prompts.of(["0.2 blue"]), 3, 5, first=5)
    assert both.text[1] == alone.text[0]
    assert both.text[1].startswith("0.2 blue ")
    assert longer.expand(Prompts.of("0.1")).text == longer.expand(Prompts.of("0.1"), 9).text  # the likeliest


def test_the_advantage_of_an_expansion_is_among_prompts_of_one_reward():
    rewards = torch.tensor([1.0, 10, 3, 30, float("nan"), 7])
    out = expansion_advantage(rewards, torch.tensor([0, 1, 0, 1, 0, 2]), 5.0)
    assert out.tolist() == pytest.approx([-1, -1, 1, 1, 0, 0], abs=1e-3)


def test_the_language_model_learns_to_write_what_is_rewarded(writer, tmp_path):
    """The reward is 1 where the network was told one of four words, whatever its pictures: they become likelier."""
    method = make("ddpo", expand={"use": writer, "tokens": 1, "rank": 4}, select="all", steps=1, group=1, batch_size=8)
    expander = method.expander
    read, good = tuple(expander.tokenizer("0.1")["input_ids"]), WORDS[:4]

    @torch.no_grad()
    def chance():
        return sum(float(expander.log_prob(read, tuple(expander.tokenizer(word)["input_ids"])).exp()) for word in good)

    rollout, first = method.rollout, chance()

    def told(ctx, prompts, told):
        data = rollout(ctx, prompts, told)
        total = torch.tensor([float(any(word in text for word in good)) for text in told.text])
        return replace(data, scores=data.scores._replace(total=total))

    method.rollout = told
    config = TrainConfig(steps=6, learning_rate=0.05, weight_decay=0.0)
    fit(method, lambda number: Prompts.of(["0.1"] * 8), config, tmp_path)
    print(f"chance: {first:.3f} -> {chance():.3f}")
    assert chance() > first + 0.2


def test_tokens_come_before_what_the_language_model_writes(writer):
    """In training as in use; it reads the prompt alone."""
    method = make(tokens="<reward {k}>", expand={"use": writer, "tokens": 2, "keep": False})
    data, _ = method.collect(context(), Prompts.of(["a red", "a blue"]))
    told = data.traj.cond.prompts
    assert [text[:11] for text in told.text[::4]] == ["<reward 1> ", "<reward 2> "]
    read = [tuple(method.expander.tokenizer(text)["input_ids"]) for text in ("a red", "a blue")]
    assert [pair[0] for pair in told.columns["expansion"][::4]] == read


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("0.1 red\n0.2 blue\n0.3 a\n0.2 red")
    Path("heldout.txt").write_text("0.3 blue\n0.1 a")
    return tmp_path


def test_a_run_with_tokens_and_expansion_leaves_all_of_it(here, writer):
    torch.manual_seed(0)
    expand = {"use": writer, "tokens": 3, "rank": 2}
    changes = {"method.select": "pareto", "method.tokens": "<reward {k}>", "method.expand": expand, "reward": REWARD}
    changes |= {"policy": {"rank": 2}, "train.steps": 4, "method.steps": 2, "evaluate.images": 1, "evaluate.every": 4}
    changes |= {
        "train.learning_rate": 0.01,
        "log.pictures": 2,
        "evaluate.watch": [],
        "evaluate.steps": 1,
        "evaluate.kl_images": 1,
    }
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    train(CONFIG, pipeline=pipe, out="whole", **changes)
    torch.manual_seed(0)
    train(CONFIG, pipeline=FAMILIES["sd"]().pipe, out="parts", minutes=0, **changes)
    torch.manual_seed(0)
    train(CONFIG, pipeline=FAMILIES["sd"]().pipe, out="parts", resume=True, **changes)
    whole, parts = (
        torch.load(f"{n}/checkpoints/step-00000004.pt", weights_only=True)["weights"] for n in ("whole", "parts")
    )
    assert any("expander" in name for name in whole)
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name])
    rows = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert "expansion_log_prob" in rows[0]
    card = Path("whole/README.md").read_text()
    assert "Put `<reward 1> <reward 2>` before prompts" in card
    trained = Expander(ExpandSettings(**expand), adapter="whole/expander")
    for name, p in trained.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(p.detach(), whole[f"expander.model.{name}"])
    assert trained.expand(Prompts.of("0.1 red")).text[0].startswith("0.1 red")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method.tokens": "<reward {k}>"}, "Expected select: pareto with tokens"),
        ({"method.tokens": "<reward>", "method.select": "pareto"}, "Expected tokens with {k}"),
        ({"method.tokens": "{k}", "method.select": "pareto", "method.combine": "gdpo"}, "Expected combine: sum"),
        ({"method.select": "pareto", "reward": "tests.test_run:Red"}, "a sum of two rewards or more"),
        ({"method.combine": "gdpo", "reward": "tests.test_run:Red"}, "with method.combine: gdpo"),
        ({"method.expand": {"use": "./nowhere"}}, "method.expand.use: no language model ./nowhere"),
        ({"method.expand": {"use": "./nowhere", "lenght": 3}}, "lenght"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_loaded(here, changes, said, monkeypatch):
    monkeypatch.setattr("t2i_align.training.run.load_pipeline", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as refused:
        train(CONFIG, **({"reward": REWARD} | changes))
    assert said in str(refused.value)
