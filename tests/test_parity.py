"""Our scorers give the originals' numbers: fixtures made by the originals themselves, see benchmarks/parity/."""

import json

import pytest
import torch

from benchmarks.parity import inputs
from benchmarks.parity.ours import FIXTURES, compare


@pytest.mark.parametrize("scorer", ["image_reward", "cyclereward", "hpsv3", "vqascore"])
def test_scores_are_the_originals(scorer, tmp_path):
    cases = compare(scorer, "reduced", tmp_path)
    assert [(case.picture, case.prompt) for case in cases] == inputs.cases("reduced")
    wrong = [case for case in cases if case.difference > 1e-4]
    assert not wrong
    scores = torch.tensor([case.original for case in cases])
    assert scores.std() > 0.1 * scores.abs().mean()  # or equality would say little


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_fixtures_say_where_they_come_from(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == f"{facts['scorer']}-{facts['size']}"
    assert facts["seed"] == inputs.SEED
    assert facts["libraries"]["transformers"].startswith("4.")
    assert len(facts["cases"]) == len(inputs.cases(facts["size"]))


def test_weights_depend_on_seed_and_name_alone():
    one, other = (
        inputs.draw_weights(shapes) for shapes in ({"a.weight": (3, 5), "b": (2,)}, {"b": (2,), "a.weight": (3, 5)})
    )
    assert all((one[name] == other[name]).all() for name in one)
    assert (inputs.draw_weights({"a.weight": (3, 5)}, seed=1)["a.weight"] != one["a.weight"]).any()
    assert one["a.weight"][0, :2].tolist() == pytest.approx([0.7145962, 0.56906384])  # as when the fixtures were made
