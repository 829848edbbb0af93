"""Our CLIP scorers give the originals' numbers: fixtures made by the originals themselves, see benchmarks/parity/."""

import pytest

from benchmarks.parity import inputs
from benchmarks.parity.ours import compare


@pytest.mark.parametrize("scorer", ["hpsv2", "pickscore"])
def test_scores_are_the_originals(scorer, tmp_path):
    cases = compare(scorer, "reduced", tmp_path)
    assert [(case.picture, case.prompt) for case in cases] == inputs.cases("reduced")
    assert not [case for case in cases if case.difference > 1e-4]
