import diffusers
import pytest
import torch

from t2i_align.pipelines.grid import _KIND, SchedulerError, prediction_type, read_grid

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make(name, steps=20, **config):
    made = getattr(diffusers, name)
    if name == "PNDMScheduler":
        config = {"skip_prk_steps": True, "steps_offset": 1} | config
    scheduler = made(**config) if "FlowMatch" in name else made(**BETAS, **config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", _KIND)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_every_readable_scheduler_gives_falling_levels(name, steps):
    grid = read_grid(make(name, steps))
    assert grid.steps == steps == len(grid.sigma) - 1 == len(grid.alpha) - 1
    assert (grid.sigma.diff() < 0).all()
    assert (grid.alpha.diff() > 0).all()
    norm = grid.alpha + grid.sigma if grid.linear else grid.alpha.square() + grid.sigma.square()
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=0, atol=1e-7)
    assert grid.linear == ("FlowMatch" in name)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_sigma_schedulers_agree_with_alphas_cumprod(name):
    scheduler = make(name, timestep_spacing="trailing")
    grid = read_grid(scheduler)
    squares = scheduler.alphas_cumprod[grid.t.long()].double()
    torch.testing.assert_close(grid.alpha[:-1].square(), squares, rtol=1e-4, atol=1e-6)


def test_ddim_ends_on_its_own_last_level():
    assert read_grid(make("DDIMScheduler", set_alpha_to_one=True)).sigma[-1] == 0
    scheduler = make("DDIMScheduler", set_alpha_to_one=False, steps_offset=1)
    assert read_grid(scheduler).alpha[-1].square() == scheduler.alphas_cumprod[0]


def test_flow_sigmas_are_taken_as_they_are():
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift=3.0)
    grid = read_grid(scheduler)
    assert torch.equal(grid.sigma, scheduler.sigmas.double())
    assert read_grid(make("DPMSolverMultistepScheduler", use_flow_sigmas=True, flow_shift=3.0)).linear


def test_levels_of_rows_broadcast_against_latents():
    grid, x = read_grid(make("DDIMScheduler")), torch.zeros(3, 4, 8, 8)
    one, many = grid.level(2, x), grid.level(torch.tensor([0, 2, 5]), x)
    assert one.alpha.shape == ()
    assert many.sigma.shape == (3, 1, 1, 1)
    assert many.alpha[1, 0, 0, 0] == one.alpha
    assert many.alpha.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("DDIMScheduler", {}, "epsilon"),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow"),
        ("FlowMatchEulerDiscreteScheduler", {}, "flow"),
    ],
)
def test_prediction_type(name, config, expected):
    assert prediction_type(make(name, **config)) == expected


def test_an_unreadable_scheduler_is_refused_by_name():
    with pytest.raises(SchedulerError, match=r"DDIM.*but got RePaintScheduler"):
        read_grid(diffusers.RePaintScheduler())


def test_runge_kutta_rows_are_refused():
    with pytest.raises(SchedulerError, match="skip_prk_steps=True"):
        read_grid(make("PNDMScheduler", skip_prk_steps=False))


def test_a_subclass_is_read_like_its_parent():
    class Mine(diffusers.DDIMScheduler):
        pass

    scheduler = Mine(**BETAS)
    scheduler.set_timesteps(10)
    assert read_grid(scheduler).steps == 10
