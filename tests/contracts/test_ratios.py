"""On-policy methods find the policy that drew their images: ratios are 1 before the first update, on every family."""

import pytest
import torch

from t2i_align.keys import generator
from t2i_align.methods import read_method
from t2i_align.methods.base import Tools
from t2i_align.pipelines.driver import Driver
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.training import Ctx
from tests.contracts.test_policies import WITHOUT_LAYERS
from tests.families import FAMILIES
from tests.families.subject import Subject

METHODS = {
    "ddpo": {"use": "ddpo"},
    "grpo": {"use": "grpo"},
    "guarded": {"use": "grpo", "guard": True},
    "windowed": {"use": "grpo", "window": 1},
    "d3po": {"use": "d3po"},
    "prdp": {"use": "prdp"},
}
PAIRS = 1e-5  # D3PO's batches are pairs, not those of the rollout: another batch's rounding, 1.1e-6 at most so far


class Told(Driver):
    """Encodes prompts also of a family without text encoders, to its ready embeddings; its images are in [0, 1]."""

    ready = None

    def encode(self, prompts, **options):
        if self.ready is None:
            return super().encode(prompts, **options)
        return self.condition(Prompts.of(prompts).text, **self.ready(len(prompts)))

    def decode(self, latents, *args, **options):
        return super().decode(latents, *args, **options).clamp(0, 1)  # two pipelines go beyond, which scorers refuse


class Trained:
    """A family with guidance and a LoRA that is not the base; all weights of those without layers to adapt."""

    def __init__(self, name):
        subject = Subject(name)
        self.family = subject.family
        self.driver = Told(self.family.pipe, **self.family.call)
        self.driver.ready = self.family.embeds
        self.policy = Policy.full(subject.pipe) if name in WITHOUT_LAYERS else Policy.lora(subject.pipe, rank=2)
        for i, p in enumerate(self.policy.trainable()):
            p.data += 0.05 * torch.randn(p.shape, generator=generator("ratios", i))


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request):
    return Trained(request.param)


@pytest.mark.parametrize("name", METHODS)
def test_ratios_are_1_before_the_first_update(trained, name, request):
    if "replay" in trained.family.cannot:
        request.applymarker(pytest.mark.xfail(reason=trained.family.cannot["replay"], strict=True))
    found, settings = read_method({"group": 3, "steps": 2, "batch_size": 3, "trained_rows": 1.0} | METHODS[name])
    reward = FunctionScorer(lambda images, prompts: images[:, 0].mean((1, 2)))
    method = found(settings, trained.policy, Tools(trained.driver, reward))
    ctx = Ctx(0, 0, torch.device("cpu"))
    with torch.no_grad():
        batch = method.collect(ctx, Prompts.of(["a red circle", "two green stars"]))
    stats = [term.stats for term in method.losses(ctx, batch)]
    off = torch.cat([(s["ratio"] - 1 if "ratio" in s else s["log_ratio"]).detach().abs() for s in stats])
    assert off.max() <= (PAIRS if name == "d3po" else 0)
