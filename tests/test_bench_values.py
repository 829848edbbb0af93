"""The calibration of a run's value function on new prompts."""

import json

import pytest
import torch

from t2i_align.bench.values import BEGIN, END, predict
from t2i_align.errors import T2IError
from t2i_align.training.run import train

QUICK = {
    "method": {"use": "vard", "group": 2, "batch_size": 2, "steps": 2, "warmup": 1, "value": {"memory": 1}},
    "prompts": {"per_round": 2, "size": 4},
    "evaluate": {"prompts": {"split": "heldout", "size": 2}, "images": 1, "steps": 1, "kl_images": 1},
    "model": {"use": "tiny-sd", "guidance": 1.0},
    "train": {"steps": 2, "learning_rate": 1e-3},
    "log": {"tensorboard": False},
}


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vard"
    train(QUICK | {"reward": "verifier", "out": str(folder), "policy": {"use": request.param}})
    return folder


def test_predictions_of_new_images(run):
    found = predict(run, 4)
    assert found.value.shape == found.plugin.shape == (8, 2)
    assert found.reward.shape == (8,)
    assert 1 > found.noise[0] > found.noise[1] > 0
    assert torch.equal(found.value, predict(run, 4).value)
    assert ((found.plugin >= 0) & (found.plugin <= 1)).all()  # the verifier's own range
    assert found.value.std() > 0


def test_the_command_fills_in_a_page(run, cli, tmp_path):
    docs = tmp_path / "page.md"
    docs.write_text(f"before\n{BEGIN}\nstale words\n{END}\nafter\n")
    code, out, _ = cli("bench", "values", run, "--prompts", "2", "--docs", docs, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["row"] for row in rows] == ["0", "1"]
    text = docs.read_text()
    assert "stale words" not in text
    assert "4 images of held-out prompts" in text
    assert "| row | noise | correlation | within | r2 | slope | error | correlation, x0 |" in text
    assert (tmp_path / "images" / "value-calibration.png").is_file()
    assert (run / "value" / "heldout.json").is_file()


def test_what_is_no_vard_run_is_refused(run, tmp_path):
    with pytest.raises(T2IError, match="to be the folder of a run"):
        predict(tmp_path, 2)
    (run / "value" / "value.json").rename(run / "value" / "hidden.json")
    try:
        with pytest.raises(T2IError, match="finished vard run"):
            predict(run, 2)
    finally:
        (run / "value" / "hidden.json").rename(run / "value" / "value.json")
