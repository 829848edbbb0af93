"""What every steering method promises on real pipelines; an entry of `METHODS` without settings here fails by name."""

import pytest
import torch

from t2i_align.pipelines import Driver
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.steering import METHODS, Ctx, load_method
from tests.families import FAMILIES

FEW = ("sd", "sd3", "flux-dev", "toy-flow")  # epsilon and flow, UNet and transformer, packed latents
SETTINGS = {
    "best_of_n": [{}, {"lam": 1.0}],
    "fk": [{}, {"potential": "max", "rows": (0, 1), "ess": 1.0}],
    "das": [{}],
    "guidance": [{}, {"jacobian": "cheap", "form": "dps", "clip": 0.1}],
    "svdd": [{"candidates": 2}],
    "reno": [{"iterations": 3}],
    "dno": [
        {"iterations": 2, "permutations": 2},
        {"iterations": 2, "permutations": 2, "noises": "start", "gradient": "hybrid", "queries": 2},
    ],
    "noise_search": [{"rounds": 1, "neighbours": 2}],
    "chain": [{"stages": [{"method": "fk", "particles": 2}, {"method": "noise_search", "rounds": 1, "neighbours": 2}]}],
}
CLIMBS = ("reno", "dno", "noise_search")  # never return less than the sample they begin with


@pytest.fixture(scope="module", params=FEW)
def family(request):
    return FAMILIES[request.param]()


def run(family, method, options):
    differentiable = load_method(method, particles=2, **options).needs_gradient
    reward = FunctionScorer(lambda images: -(images - 0.3).square().mean((1, 2, 3)), differentiable=differentiable)
    ctx = Ctx(Driver(family.pipe, **family.call), reward, family.steps, max_batch=2)
    return load_method(method, particles=2, **options)(ctx, Prompts.of(["a red circle", "a cat"])), ctx


@pytest.mark.parametrize("method", METHODS)
def test_a_family_is_steered(family, method):
    weights = {name: part.state_dict() for name, part in family.pipe.components.items() if hasattr(part, "state_dict")}
    before = {(name, key): value.clone() for name, state in weights.items() for key, value in state.items()}
    for options in SETTINGS[method]:
        result, ctx = run(family, method, options)
        prompts, particles = result.log_weight.shape
        assert result.images.shape[:3] == (prompts, particles, 3)
        assert result.images.isfinite().all()
        assert result.images.min() >= 0
        assert result.images.max() <= 1
        assert result.latents.shape[:2] == (prompts, particles) == result.totals.shape
        kept = result.start is not None and result.streams is not None
        assert kept == load_method(method, particles=2, **options).keeps_lines
        torch.testing.assert_close(result.log_weight.exp().sum(1), torch.ones(prompts, dtype=torch.float64))
        totals = -(result.images - 0.3).square().mean((2, 3, 4))
        torch.testing.assert_close(result.totals, totals, msg="scores are not those of the images")
        cost = result.cost
        assert cost.forwards >= len(ctx.history) > 0
        assert cost.decodes >= prompts * particles <= cost.scored
        assert (cost.decode_backwards > 0) == ctx.reward.differentiable
        assert cost.seconds > 0
        if method in CLIMBS:
            first = torch.tensor(ctx.history[0]["rewards"]).reshape(prompts, particles, -1)[..., 0]
            assert (result.totals >= first - 1e-6).all()
    again, _ = run(family, method, options)
    assert torch.equal(result.images, again.images), "the seed does not fix the result"
    for (name, key), value in before.items():
        assert torch.equal(value, family.pipe.components[name].state_dict()[key]), f"{name}.{key} was written to"
