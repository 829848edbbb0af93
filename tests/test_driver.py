"""The driver on tiny-sd: prompts, encoders, schedulers, kernels, refusals."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload

from t2i_align.pipelines.cond import CondError, collate
from t2i_align.pipelines.driver import Driver, DriverError, noise_of
from t2i_align.pipelines.grid import SchedulerError
from t2i_align.pipelines.indexed import needs_index
from t2i_align.pipelines.kernels import ddim, flow_sde, ode
from t2i_align.pipelines.loading import load_pipeline
from t2i_align.pipelines.toy import Mixture, toy_pipeline
from t2i_align.prompts import Prompts
from tests.families import FAMILIES

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


def test_a_column_of_negative_prompts_is_read(driver):
    table = Prompts(tuple(PROMPTS), {"negative_prompt": ("a yellow square", None, "a yellow square")})
    mixed, plain = driver.encode(table), driver.encode(PROMPTS)
    whole = driver.encode(PROMPTS, negative="a yellow square")
    for got, told, blank in zip(mixed.call(0), whole.call(0), plain.call(0), strict=True):
        torch.testing.assert_close(got[[0, 2]], told[[0, 2]])
        torch.testing.assert_close(got[1], blank[1])
    with pytest.raises(DriverError, match="takes no negative prompt"):
        Driver(toy_pipeline(size=8)).encode(Prompts(("0",), {"negative_prompt": ("1",)}))


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


def test_a_point_of_the_grid_is_its_row(driver, cond):
    x, grid = driver.start(cond, 4, seed=0), driver.grid(4)
    point = grid.at(grid.t[1].item())
    assert int(point.row) == 1
    torch.testing.assert_close(point.alpha, grid.alpha[1], rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(driver.predict(x, point, cond, 4), driver.predict(x, 1, cond, 4))
        mine, theirs = (driver.step(x, at, cond, 4) for at in (point, 1))
    torch.testing.assert_close(mine.q.mean, theirs.q.mean)
    several = grid.at(grid.t[torch.tensor([0, 2, 3])])
    assert several.row.tolist() == [0, 2, 3]


@pytest.mark.parametrize("flow", [False, True])
def test_timesteps_off_the_grid_are_exact_on_the_toy(flow):
    """The toy's denoiser is the posterior mean at any level: x0 must be it, with the level that `grid.at` says."""
    mixture = Mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-2.0] * 3, [1.0] * 3]), torch.tensor([0.5, 0.8]))
    driver = Driver(toy_pipeline(mixture, flow, size=2))
    cond = driver.condition(prompt_embeds=torch.zeros(3))
    grid = driver.grid(7)
    point = grid.at(torch.tensor([3.5, 500.0, 871.25]))
    x = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    step = driver.step(x, point, cond, 7, ddim(0.5), to=grid.at(torch.tensor([1.0, 400.0, 870.0])))
    level = grid.level(point, x)
    for i in range(3):
        inner = type(level)(level.alpha[i].flatten(), level.sigma[i].flatten())
        exact = mixture.denoise(x[i].movedim(0, -1), inner).movedim(-1, 0)
        torch.testing.assert_close(step.x0[i], exact.float(), rtol=1e-4, atol=1e-4)
    assert step.q.std.shape == (3, 1, 1, 1)
    with pytest.raises(SchedulerError, match="timesteps from 0 to"):
        grid.at(1e6)


def test_an_unrolled_run_is_the_rollout_with_its_graph(driver, cond):
    trajectory = driver.rollout(cond, 3, seed=3)
    x = trajectory.x[:, 0].clone().requires_grad_()
    gradients = []
    for checkpointing in (True, False):
        end = driver.unroll(x, cond, 3, seed=3, checkpointing=checkpointing)
        torch.testing.assert_close(end, trajectory.x[:, -1], rtol=1e-5, atol=1e-5)
        weight = next(driver.network.parameters())
        gradients.append(torch.autograd.grad(end.square().sum(), [x, weight]))
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_unrolled_run_may_start_late_and_bring_its_noise(driver, cond):
    trajectory = driver.rollout(cond, 4, seed=3)
    noise = torch.randn(3, 2, *trajectory.x.shape[2:], generator=torch.Generator().manual_seed(1)).requires_grad_()
    end = driver.unroll(trajectory.x[:, 1], cond, 4, rows=range(1, 3), noise=noise)
    (gradient,) = torch.autograd.grad(end.sum(), noise)
    assert gradient.abs().sum() > 0
    own = torch.stack([noise_of(trajectory.x[:, 0], 3, range(3), row) for row in (1, 2)], 1)
    end = driver.unroll(trajectory.x[:, 1], cond, 4, rows=range(1, 3), noise=own)
    torch.testing.assert_close(end, trajectory.x[:, 3], rtol=1e-5, atol=1e-5)


def test_a_straight_through_clamp_keeps_gradients_of_saturated_pixels():
    own = load_pipeline("tiny-sd")
    with torch.no_grad():
        own.vae.decoder.conv_out.weight.mul_(5)  # glaring colours
    driver = Driver(own)
    x = driver.start(driver.encode(PROMPTS), 4).requires_grad_()
    clamped, free = driver.decode(x), driver.decode(x, straight_through=True)
    torch.testing.assert_close(clamped, free)
    saturated = (clamped == 0) | (clamped == 1)
    assert saturated.any()
    assert not torch.autograd.grad(clamped[saturated].sum(), x)[0].any()
    assert torch.autograd.grad(free[saturated].sum(), x)[0].any()


def test_a_checkpointed_decode_has_the_same_gradient(driver, cond):
    x = driver.start(cond, 4).requires_grad_()
    images = [driver.decode(x, batch_size=2, checkpointing=again) for again in (True, False)]
    assert torch.equal(*images)
    gradients = [torch.autograd.grad(image.square().sum(), x)[0] for image in images]
    torch.testing.assert_close(*gradients)


def test_encoding_in_chunks_changes_only_rounding(driver, cond):
    small = driver.encode(PROMPTS, batch_size=1)
    for mine, theirs in zip(small.call(0), cond.call(0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_conditions_are_joined_and_moved(driver, cond):
    both = cond[:1] + driver.encode(["a blue star"])
    assert both.prompts.text == ("a red circle", "a blue star")
    assert torch.equal(both.call(0)[0][0], cond.call(0)[0][0])
    assert both.to("meta").call(0)[0].device.type == "meta"
    with pytest.raises(CondError, match="same keywords"):
        cond + driver.condition(prompt_embeds=torch.zeros(1, 16, 128))
    with pytest.raises(CondError, match="image to have 3 rows"):
        cond.having(image=torch.zeros(2, 3, 8, 8))


def test_sequences_of_different_lengths_are_padded_and_masked():
    rows = [(torch.ones(2, 4), None), (torch.ones(3, 4), torch.tensor([1, 1, 0]))]
    embeds, mask = collate(rows)
    assert embeds.shape == (2, 3, 4)
    assert mask.tolist() == [[1, 1, 0], [1, 1, 0]]
    with pytest.raises(CondError, match="in one call"):
        collate([(torch.ones(2, 4),), (torch.ones(3, 4),)])


def test_freed_text_encoders_are_gone_but_the_run_goes_on():
    own = load_pipeline("tiny-sd")
    driver = Driver(own, guidance_scale=3.0)
    cond = driver.encode(PROMPTS)
    before = driver.rollout(cond, 2).x
    freed = driver.free_text_encoders(drop=True)
    assert freed == 4 * sum(p.numel() for p in own.text_encoder.parameters())
    assert next(own.text_encoder.parameters()).is_meta
    assert torch.equal(driver.rollout(cond, 2).x, before)
    assert driver.generate(cond, 2).isfinite().all()
    with pytest.raises(DriverError, match="were freed"):
        driver.encode("a red circle")


def test_an_offloaded_pipeline_samples_but_has_no_gradients(driver, cond):
    """accelerate's hooks hold the weights elsewhere ("meta") and bring them in for each call."""
    own = load_pipeline("tiny-sd")
    for module in (own.unet, own.vae, own.text_encoder):
        cpu_offload(module, execution_device=torch.device("cpu"))
    offloaded = Driver(own, guidance_scale=3.0)
    assert not offloaded.stays
    theirs = offloaded.rollout(offloaded.encode(PROMPTS), 2)
    assert torch.equal(theirs.x, driver.rollout(cond, 2).x)
    with torch.no_grad():
        offloaded.decode(theirs.x[:, -1])
    with pytest.raises(DriverError, match="offloaded"):
        offloaded.predict(theirs.x[:, 0].requires_grad_(), 0, cond, 2)


def test_an_active_cache_is_refused():
    pipe = FAMILIES["flux-schnell"]().pipe
    driver = Driver(pipe, height=16, width=16)
    cond = driver.condition(prompt_embeds=torch.randn(1, 7, 32), pooled_prompt_embeds=torch.randn(1, 32))
    x = driver.start(cond, 2)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(DriverError, match="no active cache"):
        driver.predict(x, 0, cond, 2)


def test_calls_are_split_by_timestep_only_where_the_loop_needs_it(pipe, cond, monkeypatch):
    """What else fails is no reason, above all too little memory; the user is told why it became slower."""
    driver, at = Driver(pipe, guidance_scale=3.0), torch.tensor([0, 1])
    x, mine = driver.start(cond[[0, 1]], 4), cond[[0, 1]]
    expected, whole, failing = driver.predict(x, at, mine, 4), driver._predict, []

    def fails(x, at, *rest):
        if isinstance(at, torch.Tensor):
            failing.append(1)
            raise errors.pop(0)
        return whole(x, at, *rest)

    monkeypatch.setattr(driver, "_predict", fails)
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory (1 GB)")]
    while errors:
        with pytest.raises(RuntimeError, match="out of memory"):
            driver.predict(x, at, mine, 4)
    assert not driver.one_timestep
    errors.append(RuntimeError("a Tensor with 2 elements cannot be converted to Scalar"))
    with pytest.warns(UserWarning, match="one timestep in a call, .* cannot be converted to Scalar"):
        torch.testing.assert_close(driver.predict(x, at, mine, 4), expected, rtol=1e-5, atol=1e-5)
    driver.predict(x, at, mine, 4)
    assert len(failing) == 3  # from then on it is not tried


def test_only_loops_that_read_their_index_are_said_to():
    assert not needs_index(diffusers.StableDiffusionPipeline, {})
    assert not needs_index(diffusers.FluxPipeline, {})
    assert not needs_index(diffusers.StableDiffusion3Pipeline, {})
    assert needs_index(diffusers.StableDiffusion3Pipeline, {"skip_guidance_layers": [1]})
    assert not needs_index(diffusers.Lumina2Pipeline, {})
    assert needs_index(diffusers.Lumina2Pipeline, {"cfg_trunc_ratio": 0.5})
    assert not needs_index(diffusers.StableDiffusionControlNetPipeline, {})
    assert needs_index(diffusers.StableDiffusionControlNetPipeline, {"control_guidance_end": 0.5})


def test_refusals_are_clear(pipe, driver, cond):
    with pytest.raises(DriverError, match=r"takes no guidance_scal\. Did you mean 'guidance_scale'"):
        Driver(pipe, guidance_scal=3.0)
    with pytest.raises(DriverError, match="flow-matching"):
        driver.step(driver.start(cond, 4), 0, cond, 4, flow_sde())
    with pytest.raises(DriverError, match="cond of 2 rows"):
        driver.predict(torch.zeros(2, 8, 8, 8), 0, cond, 4)
    with pytest.raises(DriverError, match="no Gaussian"):
        driver.rollout(cond, 4, kernel="native")
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
