"""The judge behind an endpoint, against a real server: forms, retries, cache, NaN with a reason and never 0."""

import base64
import io
import json
import math
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.rewards import RewardError, check_reward, load_reward
from t2i_align.rewards.judge_forms import UNIFIED_REWARD, read_score, read_yes_no
from t2i_align.rewards.vlm_judge import KEY, MODEL, URL, VLMJudge
from tests.tiny_vlm import Judge, likes, says

PICTURES = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path))
    for variable in (URL, KEY, MODEL):
        monkeypatch.delenv(variable, raising=False)
    server = Judge()
    yield server
    server.shutdown()
    server.server_close()


def judge(server, **options):
    return VLMJudge("m", server.url, **{"workers": 1, "wait": 0.01, **options})


def test_yes_and_no_are_weighed_over_all_their_spellings(server):
    server.replies = [
        (200, likes(("Yes", 0.6), ("No", 0.2), ("Perhaps", 0.1))),
        (200, likes((" yes", 0.25), ("YES.", 0.05), ("no", 0.06), ("No,", 0.04))),
        (200, likes(("No", 0.5), ("nope", 0.4))),
    ]
    total = judge(server).scores(PICTURES, "a cat").total
    torch.testing.assert_close(total, torch.tensor([0.75, 0.75, 0.0]))
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["temperature"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (0, 1, True, 20)
    picture, question = body["messages"][0]["content"]
    assert question["text"] == 'Does this image show "a cat"? Answer Yes or No.'
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(sent), np.asarray(PICTURES[0]))


def test_a_model_that_thinks_first_is_read_at_its_last_answer():
    thought, verdict = likes(("yes", 0.9)), likes(("No", 0.8), ("Yes", 0.2))
    tokens = [
        one["choices"][0]["logprobs"]["content"][0] for one in (thought, likes(("so", 1.0)), verdict, likes((".", 1.0)))
    ]
    assert read_yes_no({"logprobs": {"content": tokens}}) == pytest.approx(0.2)


def test_what_cannot_be_read_is_nan_with_a_reason_and_is_asked_again_next_time(server):
    scorer = judge(server)
    server.replies = [(200, likes(("Maybe", 0.9))), (200, likes(("Yes", 0.5), ("No", 0.5)))]
    with pytest.warns(UserWarning, match=r"could not read 1 of 2 replies \(1 of 2 so far\): NaN; .*neither Yes nor No"):
        total = scorer.scores(PICTURES[:2], "a cat").total
    assert total[0].isnan()
    assert total[1] == 0.5
    server.replies = [(200, says("Yes"))]
    with pytest.warns(UserWarning, match="no log-probabilities"):
        assert scorer.scores(PICTURES[0], "a cat").total.isnan().all()
    assert (scorer.asked, scorer.unread) == (3, 2)


@pytest.mark.parametrize(
    "reply", [(500, b"oops"), (429, b"slow down"), (200, b"{ not JSON"), (200, {"choices": []}), (200, b"")]
)
def test_passing_failures_are_tried_again(server, reply):
    server.replies = [reply, reply, (200, likes(("Yes", 0.9), ("No", 0.1)))]
    assert judge(server, tries=3).scores(PICTURES[0], "a cat").total.item() == pytest.approx(0.9)
    assert len(server.requests) == 3


def test_tries_end(server):
    server.replies = [(503, b"busy")] * 3
    with pytest.warns(UserWarning, match="answered 503: busy"):
        assert judge(server, tries=3).scores(PICTURES[0], "a cat").total.isnan().all()
    assert len(server.requests) == 3
    server.replies = [(400, b"unsafe picture")]
    with pytest.warns(UserWarning, match="answered 400: unsafe picture"):
        assert judge(server).scores(PICTURES[0], "a cat").total.isnan().all()
    assert len(server.requests) == 4  # it would be refused again


def test_a_slow_reply_is_not_waited_for(server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        scorer = VLMJudge("m", f"http://127.0.0.1:{silent.getsockname()[1]}/v1", tries=2, wait=0, timeout=0.1)
        with pytest.warns(UserWarning, match=r"broke off|timed out"):
            assert scorer.scores(PICTURES[0], "a cat").total.isnan().all()


def test_what_no_picture_can_mend_is_an_error(server, monkeypatch):
    server.replies = [(401, b"no such key"), (404, b"no model m")]
    with pytest.raises(RewardError, match="401, the key is refused: no such key"):
        judge(server).scores(PICTURES[0], "a cat")
    with pytest.raises(RewardError, match="404, it knows no such model"):
        judge(server).scores(PICTURES[0], "a cat")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(RewardError, match="There is no judge at"):
        VLMJudge("m", f"http://127.0.0.1:{port}/v1", tries=2, wait=0).scores(PICTURES[0], "a cat")


def test_replies_are_kept_by_picture_prompt_template_model_and_parameters(server):
    def asked(options, picture=PICTURES[0], prompt="a cat"):
        before = len(server.requests)
        judge(server, **options).scores(picture, prompt)
        return len(server.requests) - before

    assert asked({}) == 1
    assert asked({}) == 0
    assert asked({}, picture=PICTURES[1]) == 1
    assert asked({}, prompt="a dog") == 1
    assert asked({"template": "Is {prompt} there?"}) == 1
    assert asked({"parameters": {"seed": 1}}) == 1
    assert asked({"size": 4}) == 1
    assert asked({"cache": False}) == 1
    before = len(server.requests)
    VLMJudge("other", server.url).scores(PICTURES[0], "a cat")
    assert len(server.requests) - before == 1
    assert asked({}) == 0


def test_a_damaged_entry_of_the_cache_is_asked_again(server, tmp_path):
    scorer = judge(server)
    first = scorer.scores(PICTURES[0], "a cat").total
    (entry,) = (tmp_path / "judge").glob("*.json")
    entry.write_text('{"val')
    assert torch.equal(scorer.scores(PICTURES[0], "a cat").total, first)
    assert len(server.requests) == 2
    assert json.loads(entry.read_text())["value"] == pytest.approx(first.item())


def test_many_are_asked_at_once_and_stay_in_order(server):
    pictures = [
        Image.fromarray(np.random.default_rng(n).integers(0, 1 + 25 * n, (8, 8, 3), dtype=np.uint8)) for n in range(9)
    ]
    one = judge(server, workers=1, cache=False).scores(pictures, "a cat").total
    assert torch.equal(judge(server, workers=5, cache=False).scores(pictures, "a cat").total, one)
    assert len(one.unique()) == 9


def test_unified_reward_reads_the_final_score(server):
    server.replies = [
        (200, says("circle (object): 1\nFinal Score: 4.25")),
        (200, says("Final Score: 1? no.\n**Final Score:** 3")),
        (200, says("I cannot say.")),
    ]
    with pytest.warns(UserWarning, match=r"no final score from 1 to 5 in 'I cannot say\.'"):
        total = judge(server, form="unified_reward", size=4).scores(PICTURES, "a {cat}").total
    torch.testing.assert_close(total, torch.tensor([4.25, 3.0, math.nan]), equal_nan=True)
    text = server.requests[0][2]["messages"][0]["content"][1]["text"]
    assert text == UNIFIED_REWARD.replace("{prompt}", "a {cat}")
    assert text.endswith("Text Caption: [a {cat}]")


@pytest.mark.parametrize(
    "text", ["Final Score: 10", "Final Score: 6", "Final Score: 5.5", "Final Score: 0.4", "Score: 4", ""]
)
def test_scores_outside_the_scale_are_not_read(text):
    assert isinstance(read_score({"message": {"content": text}}), str)


def test_a_rubric_of_ones_own_and_a_key(server, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    scorer = judge(server, form="rubric", template="Judge {prompt}. End with Final Score: N.", label="strict")
    assert scorer.range == (1.0, 5.0)
    assert list(scorer.scores(PICTURES[:1], "a cat").parts) == ["strict"]
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    with pytest.raises(RewardError, match=r"have \{prompt\}"):
        judge(server, template="Is it good?")
    with pytest.raises(RewardError, match="Did you mean 'rubric'"):
        judge(server, form="rubrik")


def test_the_endpoint_is_named_by_options_or_variables(server, monkeypatch):
    with pytest.raises(RewardError, match=r"url \(or \$OPENAI_BASE_URL\) and model \(or \$T2I_ALIGN_JUDGE\)"):
        check_reward("vlm_judge")
    with pytest.raises(RewardError, match="start with http:// or https://"):
        VLMJudge("m", "localhost:8000/v1")
    block = {"judge": {"use": "vlm_judge", "options": {"model": "m", "url": server.url}}}
    assert load_reward(block).scores(PICTURES[:1], "a cat").total.isfinite().all()
    monkeypatch.setenv(URL, server.url)
    monkeypatch.setenv(MODEL, "m")
    assert load_reward("vlm_judge").scores(PICTURES[:1], "a cat").total.isfinite().all()


def test_two_judges_are_never_taken_for_one(server):
    from t2i_align.rewards.reference import _hash_scorer

    assert _hash_scorer(judge(server)) == _hash_scorer(judge(server))
    assert _hash_scorer(judge(server)) != _hash_scorer(judge(server, template="Is {prompt} there?"))
