"""What the driver promises of every pipeline family; adding a family adds its tests."""

import copy
import inspect

import pytest
import torch

from t2i_align.keys import generator
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim
from tests.families import FAMILIES

B, STEPS = 3, 4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    made = FAMILIES[request.param]()
    made.pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def driver(family):
    return Driver(family.pipe, **family.call)


@pytest.fixture(scope="module")
def cond(driver, family):
    return driver.condition(**family.embeds(B))


@pytest.fixture(scope="module")
def trajectory(driver, cond):
    return driver.rollout(cond, STEPS, ddim(1.0), seed=1)


def test_a_rollout_is_replayed_bit_for_bit(driver, cond, trajectory):
    assert trajectory.steps == STEPS
    assert trajectory.x.isfinite().all()
    for row in range(STEPS):
        with torch.no_grad():
            q = driver.step(trajectory.x[:, row], row, cond, STEPS, ddim(1.0)).q
        assert torch.equal(q.log_prob(trajectory.x[:, row + 1]), trajectory.log_prob[:, row])


def test_splitting_the_batch_changes_only_rounding(driver, cond, trajectory):
    split = driver.rollout(cond, STEPS, ddim(1.0), seed=1, batch_size=2)
    torch.testing.assert_close(split.x, trajectory.x, rtol=1e-4, atol=1e-4)


def test_samples_are_keyed_by_their_ids(driver, cond, trajectory):
    alone = driver.rollout(cond[[2]], STEPS, ddim(1.0), seed=1, ids=[2])
    torch.testing.assert_close(alone.x[0], trajectory.x[2], rtol=1e-4, atol=1e-4)


def test_generate_is_the_pipeline_itself_bit_for_bit(driver, cond, family):
    draws = [generator(1, "start", i) for i in range(B)]
    options = {**family.call, **family.embeds(B), "num_inference_steps": STEPS, "output_type": "pt"}
    theirs = family.pipe(generator=draws, **options)[0]
    assert torch.equal(driver.generate(cond, STEPS, seed=1), theirs)


def test_decode_is_the_pipeline_itself_bit_for_bit(driver, cond, family):
    draws = [generator(1, "start", i) for i in range(B)]
    options = {**family.call, **family.embeds(B), "num_inference_steps": STEPS, "output_type": "latent"}
    seen = []
    if "callback_on_step_end" in driver.accepts:  # the latents of the loop, before a pipeline unpacks them
        options["callback_on_step_end"] = lambda pipe, row, t, values: seen.append(values["latents"]) or values
    latents = family.pipe(generator=draws, **options)[0]
    latents = seen[-1] if seen else latents
    images = driver.decode(latents)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images.detach(), driver.generate(cond, STEPS, seed=1))


def test_gradients_reach_network_and_latents(driver, cond, trajectory):
    x = trajectory.x[:, 1].clone().requires_grad_()
    driver.predict(x, 1, cond, STEPS).square().mean().backward()
    assert x.grad.abs().sum() > 0
    parameters = list(driver.network.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    driver.network.zero_grad()
    x = trajectory.x[:, -1].clone().requires_grad_()
    driver.decode(x).mean().backward()
    assert x.grad.abs().sum() > 0


def test_no_graph_is_built_without_gradients(driver, cond, trajectory):
    with torch.no_grad():
        assert not driver.predict(trajectory.x[:, 0], 0, cond, STEPS).requires_grad


def test_rows_may_differ_between_samples(driver, cond, trajectory):
    at = torch.tensor([0, 2, 3])
    x = torch.stack([trajectory.x[i, row] for i, row in enumerate(at.tolist())])
    with torch.no_grad():
        together = driver.predict(x, at, cond, STEPS)
        each = torch.stack([driver.predict(x, row, cond, STEPS)[i] for i, row in enumerate(at.tolist())])
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-5)


def broken(*args):
    raise RuntimeError("broken on purpose")


def test_the_users_pipeline_is_left_as_it_was(driver, cond, family, trajectory):
    before = copy.copy(family.pipe.__dict__)
    scheduler = copy.deepcopy(family.pipe.scheduler.__dict__)
    driver.rollout(cond, 2)
    driver.decode(trajectory.x[:, -1])
    hook = driver.network.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        driver.predict(trajectory.x[:, 0], 0, cond, STEPS)
    hook.remove()
    after = family.pipe.__dict__
    assert {name: id(value) for name, value in before.items()} == {name: id(value) for name, value in after.items()}
    assert scheduler.keys() == family.pipe.scheduler.__dict__.keys()
    for name, value in scheduler.items():
        now = family.pipe.scheduler.__dict__[name]
        assert torch.equal(value, now) if isinstance(value, torch.Tensor) else str(value) == str(now)


def test_calls_may_be_nested(driver, cond, trajectory):
    """A call with another guidance inside `on_step` must not disturb the run around it."""
    name = next(n for n in ("guidance_scale", "true_cfg_scale") if n in inspect.signature(driver.function).parameters)

    def nested(row, step, x):
        driver.predict(x, row, cond, STEPS, **{name: 1.0})

    inner = driver.rollout(cond, STEPS, ddim(1.0), seed=1, on_step=nested)
    assert torch.equal(inner.x, trajectory.x)
