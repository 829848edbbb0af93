"""What the driver promises of every pipeline family; adding a family adds its tests."""

from pathlib import Path

import diffusers
import pytest
import torch

from tests.families import FAMILIES
from tests.families.exports import text_to_image
from tests.families.promises import PROMISES, NotApplicable
from tests.families.subject import Subject


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request):
    return Subject(request.param)


@pytest.mark.filterwarnings("error:.*takes one timestep in a call")  # such families are known by name
@pytest.mark.parametrize("name", PROMISES)
def test_promise(subject, name, request):
    if name in subject.family.cannot:
        request.applymarker(pytest.mark.xfail(reason=subject.family.cannot[name], strict=True))
    promise = PROMISES[name]
    try:
        measured = promise.measure(subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
    assert measured <= promise.bound_of(subject), promise.says


def test_no_graph_is_built_without_gradients(subject):
    with torch.no_grad():
        assert not subject.driver.predict(subject.trajectory.x[:, 0], 0, subject.cond, subject.steps).requires_grad


def test_the_documentation_lists_every_family_and_exported_pipeline():
    listed = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text().split("families -->")[1]
    assert [name for name in FAMILIES if f"| {name} |" not in listed] == []
    theirs = [name for name in FAMILIES if name not in ("toy", "toy-flow")]  # diffusers', not the package's own
    for page in ("README.md", "docs/pipelines.md"):
        assert f"{len(theirs)} families" in (Path(__file__).parents[2] / page).read_text()
    if diffusers.__version__ not in listed:
        pytest.skip(f"the lists are not those of diffusers {diffusers.__version__}")
    assert [name for name in text_to_image() if name.removesuffix("Pipeline") not in listed] == []
