import math

import pytest
import torch

from t2i_align.prompts import Prompts
from t2i_align.rewards import RewardError
from t2i_align.rewards.diagnostics import (
    Contrast,
    Stability,
    best_of_n_chi2,
    best_of_n_kl,
    chi2_of_weights,
    contrast,
    fit_overoptimisation,
    gold_bound,
    stability,
    starc,
    still_safe,
    within_prompt_correlation,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PROMPTS = Prompts(tuple("pqrs") * 500)


def test_starc_is_0_root_2_and_2():
    reward = normal(2000)
    shifts = torch.tensor([0.0, 50.0, -9.0, 3.0], dtype=torch.float64).repeat(500)  # a constant per prompt
    values = torch.stack([reward, 7 * reward + shifts, -0.1 * reward, normal(2000, seed=1)], 1)
    distance = starc(values, PROMPTS)
    assert distance[0, 1].item() == pytest.approx(0.0, abs=1e-6)
    assert distance[0, 2].item() == pytest.approx(2.0)
    assert distance[0, 3].item() == pytest.approx(math.sqrt(2), abs=0.05)
    epic = ((1 - within_prompt_correlation(values, PROMPTS)) / 2).sqrt()
    torch.testing.assert_close(distance, 2 * epic)


def test_stability_counts_flips_and_changes():
    prompts = Prompts.of(["p", "p", "p", "q"])
    before = torch.tensor([1.0, 2.0, 3.0, 9.0])
    assert stability(before, before, prompts) == Stability(0.0, 0.0)
    turned = stability(before, torch.tensor([2.5, 2.0, 3.0, 9.0]), prompts)
    assert turned.flips == pytest.approx(1 / 3)
    assert turned.ratio == pytest.approx(1.5 / 4 / math.sqrt(2 / 4))
    with pytest.raises(RewardError, match="two different scores"):
        stability(torch.ones(4), torch.ones(4), prompts)


def test_contrasts_of_prompts_and_images():
    right, swapped = torch.eye(2), 1 - torch.eye(2)
    assert contrast(right[None]) == Contrast(1.0, 1.0, 1.0)
    assert contrast(swapped[None]) == Contrast(0.0, 0.0, 0.0)
    assert contrast(torch.stack([right, swapped, right, right])) == Contrast(0.75, 0.75, 0.75)
    blind = normal(50, 2, 1).expand(50, 2, 2)  # reads no prompt
    assert contrast(blind) == Contrast(0.5, 0.5, 0.0)
    # Prefers image 0 under both prompts, but knows which prompt fits each image.
    assert contrast(torch.tensor([[[5.0, 4.0], [1.0, 2.0]]])) == Contrast(0.5, 1.0, 0.0)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_by_sampling(n):
    assert best_of_n_kl(1) == best_of_n_chi2(1) == 0.0
    # The density ratio at quantile u is n u^(n - 1).
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:]
    ratio = n * u ** (n - 1)
    assert (ratio * ratio.log()).mean().item() == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert (ratio.square().mean() - 1).item() == pytest.approx(best_of_n_chi2(n), abs=1e-3)
    assert best_of_n_chi2(n) >= math.exp(best_of_n_kl(n)) - 1


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.5])
def test_weights_of_a_tilt_have_its_chi2(strength):
    reward = normal(400_000)
    assert chi2_of_weights(strength * reward).item() == pytest.approx(math.exp(strength**2) - 1, rel=0.02)
    # A mean shift has the same: E_q[q / p] - 1 with log q / p = delta x - delta^2 / 2, x ~ N(delta, 1).
    shifted = (strength * (reward + strength) - strength**2 / 2).exp().mean() - 1
    assert shifted.item() == pytest.approx(math.exp(strength**2) - 1, rel=0.02)
    assert chi2_of_weights(torch.zeros(2, 5)).tolist() == pytest.approx([0.0, 0.0])


def test_the_gold_bound_holds_and_is_tight():
    # Policies shift a 2-D Gaussian base; proxy = x, gold = rho x + sqrt(1 - rho^2) y.
    rho = 0.8
    for angle in torch.linspace(-1.4, 1.4, 15).tolist():
        shift = 0.5
        proxy = shift * math.cos(angle)
        gold = rho * proxy + math.sqrt(1 - rho**2) * shift * math.sin(angle)
        bound = gold_bound(proxy, rho, math.exp(shift**2) - 1)
        assert gold >= bound
        published = (proxy - math.sqrt((1 - rho**2) * (math.exp(shift**2) - 1))) / rho
        assert bound >= published
    # Tight: the density 1 + d x - sqrt(c - d^2) y has chi^2 = c, and exactly this gold.
    d, c = 0.3, 0.25
    assert gold_bound(d, rho, c) == pytest.approx(rho * d - 0.6 * math.sqrt(c - d * d))
    assert gold_bound(0.5, 1.0, 0.25) == 0.5


@pytest.mark.parametrize(("best_of_n", "peak"), [(True, (2.0, 2.0)), (False, (math.exp(3), 0.5 * math.exp(3)))])
def test_overoptimisation_curves_are_recovered(best_of_n, peak):
    d = torch.linspace(0.2, 6, 40, dtype=torch.float64)
    gold = d * (2 - 0.5 * (d if best_of_n else d.log()))
    curve = fit_overoptimisation(d, gold, best_of_n)
    assert (curve.alpha, curve.beta) == pytest.approx((2.0, 0.5), abs=1e-10)
    assert curve.peak == pytest.approx(peak)
    assert curve.r2(d, gold) == pytest.approx(1)
    assert curve.r2(d, gold + 0.3) == pytest.approx(1 - 0.3**2 / float(gold.var(correction=0)))


def test_stopping_on_the_disc_has_no_drop():
    # Reward on the unit circle: proxy along angle 0, gold anywhere within theta. Walking down from 150 degrees along
    # the tangent, the guarantee ends at the angle theta, where a gold reward at that angle has its maximum.
    theta, step = math.radians(25), math.radians(0.1)
    angle = math.radians(150)
    while still_safe(torch.tensor([math.sin(angle), -math.cos(angle)]), torch.tensor([1.0, 0.0]), math.cos(theta)):
        angle -= step
    assert math.degrees(angle) == pytest.approx(25, abs=0.2)
