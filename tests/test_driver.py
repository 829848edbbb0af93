"""The driver on tiny-sd: prompts, encoders, schedulers, kernels, refusals."""

import diffusers
import pytest
import torch

from t2i_align.pipelines.driver import Driver, DriverError
from t2i_align.pipelines.grid import SchedulerError
from t2i_align.pipelines.kernels import ddim, flow_sde, ode
from t2i_align.pipelines.loading import load_pipeline
from t2i_align.pipelines.toy import Mixture, toy_pipeline

PROMPTS = ["a red circle", "two green stars", "a red circle"]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("tiny-sd")


@pytest.fixture(scope="module")
def driver(pipe):
    return Driver(pipe, guidance_scale=3.0)


@pytest.fixture(scope="module")
def cond(driver):
    return driver.encode(PROMPTS)


def with_scheduler(pipe, scheduler):
    return type(pipe)(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)


def test_the_text_encoder_runs_once_per_prompt_and_then_never_again(pipe):
    seen = []
    hook = pipe.text_encoder.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    driver = Driver(pipe, guidance_scale=3.0)
    cond = driver.encode(PROMPTS)
    encoded = sum(seen)
    driver.rollout(cond.repeat(2), 2)
    driver.generate(cond, 2)
    hook.remove()
    assert len(cond.encoded) == 2
    assert encoded == sum(seen) == 4  # two prompts, and the empty one once for each of them


def test_prompts_are_encoded_as_the_pipeline_does(driver, cond, pipe):
    own = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    for mine, theirs in zip(cond.call(0), own, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_conditions_are_picked_and_repeated(cond):
    assert cond.repeat(2).prompts.text == tuple(p for p in PROMPTS for _ in range(2))
    assert cond[1:].rows == (1, 0)
    assert torch.equal(cond[[2, 1]].call(0)[0], cond.call(0)[0][[2, 1]])


def test_negative_prompts_change_the_guided_output(driver, cond):
    x = driver.start(cond, 4, seed=0)
    other = driver.encode(PROMPTS, negative="a yellow square")
    with torch.no_grad():
        guided = [driver.predict(x, 1, c, 4) for c in (cond, other)]
        plain = [driver.predict(x, 1, c, 4, guidance_scale=1.0) for c in (cond, other)]
    assert (guided[0] - guided[1]).abs().max() > 1e-3
    torch.testing.assert_close(plain[0], plain[1])


def test_guidance_can_be_turned_on_although_it_was_off_when_encoding(pipe):
    cond = Driver(pipe, guidance_scale=1.0).encode(PROMPTS)
    on, off = (Driver(pipe, guidance_scale=scale) for scale in (3.0, 1.0))
    x = on.start(cond, 4, seed=0)
    with torch.no_grad():
        assert torch.equal(on.predict(x, 1, cond, 4), off.predict(x, 1, cond, 4, guidance_scale=3.0))


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DDPMScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_every_scheduler_draws_the_same_picture_by_our_ode(pipe, name):
    """One network, one prompt, one kernel: the schedulers only choose where the levels lie."""
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    images = []
    for own in (pipe, with_scheduler(pipe, scheduler)):
        driver = Driver(own, guidance_scale=3.0)
        cond = driver.encode(PROMPTS[:1])
        images.append(driver.decode(driver.rollout(cond, 30, ode(), seed=4).x[:, -1]).detach())
    assert (images[0] - images[1]).abs().mean() < 0.03


def test_ddim_0_is_the_pipelines_own_ddim(driver, cond):
    mine = driver.generate(cond, 10, ddim(0.0), seed=2)
    torch.testing.assert_close(mine.detach(), driver.generate(cond, 10, seed=2), rtol=0, atol=1e-4)


def test_the_ode_is_the_schedulers_own_euler(pipe):
    euler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    driver = Driver(with_scheduler(pipe, euler))
    cond = driver.encode(PROMPTS)
    mine = driver.generate(cond, 10, ode(), seed=2)
    torch.testing.assert_close(mine.detach(), driver.generate(cond, 10, seed=2), rtol=0, atol=1e-4)


def test_half_precision_is_replayed_exactly(pipe):
    half = load_pipeline("tiny-sd", dtype=torch.bfloat16)
    driver = Driver(half, guidance_scale=3.0)
    cond = driver.encode(PROMPTS)
    trajectory = driver.rollout(cond, 4, ddim(1.0))
    assert trajectory.x.dtype == torch.bfloat16
    assert trajectory.log_prob.dtype == torch.float32
    with torch.no_grad():
        for row in range(4):
            again = driver.step(trajectory.x[:, row], row, cond, 4, ddim(1.0)).q.log_prob(trajectory.x[:, row + 1])
            assert torch.equal(again, trajectory.log_prob[:, row])


def test_on_step_may_replace_the_latents(driver, cond):
    seen = []

    def first_for_all(row, step, x):
        seen.append((row, step.x0.shape, step.q.mean.shape))
        return x[:1].expand_as(x)

    trajectory = driver.rollout(cond, 3, on_step=first_for_all)
    assert [row for row, *_ in seen] == [0, 1, 2]
    assert torch.equal(trajectory.x[0, -1], trajectory.x[2, -1])


def test_stochastic_rows_are_those_with_noise(driver, cond):
    assert driver.rollout(cond, 3, ddim(1.0)).stochastic == (0, 1, 2)
    trajectory = driver.rollout(cond, 3, ddim(0.0))
    assert trajectory.stochastic == ()
    assert not trajectory.log_prob.any()


def test_gradients_agree_with_finite_differences():
    """A directional derivative through predict, step and decode, in float64 on the toy."""
    mixture = Mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-2.0] * 3, [1.0] * 3]), torch.tensor([0.5, 0.8]))
    pipe = toy_pipeline(mixture, size=2)
    pipe.to(torch.float64)
    driver = Driver(pipe)
    cond = driver.condition(prompt_embeds=torch.zeros(2, dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(2, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))

    def value(z):
        return driver.predict(z, 1, cond, 4).square().sum() + driver.decode(z).square().sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        difference = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-7, atol=1e-7)


def test_refusals_are_clear(pipe, driver, cond):
    with pytest.raises(DriverError, match=r"takes no guidance_scal\. Did you mean 'guidance_scale'"):
        Driver(pipe, guidance_scal=3.0)
    with pytest.raises(DriverError, match="flow-matching"):
        driver.step(driver.start(cond, 4), 0, cond, 4, flow_sde())
    with pytest.raises(DriverError, match="cond of 2 rows"):
        driver.predict(torch.zeros(2, 8, 8, 8), 0, cond, 4)
    with pytest.raises(DriverError, match="'fast'"):
        driver.generate(cond, 4, kernel="fast")
    swapped = with_scheduler(pipe, diffusers.RePaintScheduler())
    with pytest.raises(SchedulerError, match="RePaintScheduler"):
        Driver(swapped)


def test_a_pipeline_without_latents_is_refused():
    class Cascade(diffusers.DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self, prompt):
            return prompt

    with pytest.raises(DriverError, match="encode_prompt, prepare_latents, a latents= argument but Cascade has none"):
        Driver(Cascade(diffusers.DDIMScheduler()))
