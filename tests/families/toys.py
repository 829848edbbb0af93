"""The closed-form toy, a pipeline like any other."""

import torch

from t2i_align.pipelines.toy import Mixture, toy_pipeline
from tests.families.parts import Family


def toy(flow=False):
    mixture = Mixture(torch.tensor([0.4, 0.6]), torch.tensor([[-2.0] * 3, [1.0] * 3]), torch.tensor([0.5, 0.8]))
    embeds = lambda rows: {"prompt_embeds": torch.arange(rows) / 2}  # noqa: E731
    return Family(toy_pipeline(mixture, flow, size=2), embeds, {"guidance_scale": 2.0})


def toy_flow():
    return toy(flow=True)
