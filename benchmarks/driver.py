"""What the driver costs: medians of alternating pairs in one run, at 20 steps.

    python benchmarks/driver.py [PAIRS]

On tiny-sd at batch 16 and on a UNet of 100 M random weights at batch 1: `sampling` compares `generate(kernel="ode")`
with the bare pipeline, `recording` a rollout that keeps every latent and log-probability, `predict` one guided network
call with the same call by hand.
"""

import sys
import time
from statistics import median

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from t2i_align.pipelines import Driver, ddim, load_pipeline, ode

STEPS, GUIDANCE = 20, 3.0
PAIRS = int(sys.argv[1]) if len(sys.argv) > 1 else 7


def hundred_million():
    """tiny-sd around a UNet of Stable Diffusion's form with 100 M random weights."""
    parts = load_pipeline("tiny-sd").components
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(288, 416),
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=128,
        attention_head_dim=8,
        transformer_layers_per_block=2,
    )
    pipe = StableDiffusionPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cases(pipe, batch):
    driver = Driver(pipe, guidance_scale=GUIDANCE)
    cond = driver.encode(["a red circle left of a blue square"] * batch)
    positive, negative = cond.call(0)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    latents = driver.start(cond, STEPS)
    t = driver.grid(STEPS).t[5]

    @torch.no_grad()
    def bare(output_type="pt"):
        pipe(latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type=output_type, **embeds)

    @torch.no_grad()
    def by_hand():
        for _ in range(STEPS):  # as long as a run, so that the clock and the scheduler of the machine do not matter
            blind, told = pipe.unet(torch.cat([latents] * 2), t, torch.cat([negative, positive])).sample.chunk(2)
            blind + GUIDANCE * (told - blind)

    @torch.no_grad()
    def predict():
        for _ in range(STEPS):
            driver.predict(latents, 5, cond, STEPS)

    return {
        "sampling": (bare, lambda: driver.generate(cond, STEPS, ode(), batch_size=batch)),
        "recording": (lambda: bare("latent"), lambda: driver.rollout(cond, STEPS, ddim(1.0), batch_size=batch)),
        "predict": (by_hand, predict),
    }


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


for label, pipe, batch in (("tiny-sd", load_pipeline("tiny-sd"), 16), ("100 M UNet", hundred_million(), 1)):
    size = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    print(f"{label}: {size:.0f} M parameters, batch {batch}, {STEPS} steps, {PAIRS} pairs")
    for name, (base, ours) in cases(pipe, batch).items():
        base(), ours()
        pairs = [(seconds(base), seconds(ours)) for _ in range(PAIRS)]
        first, second = (median(pair[i] for pair in pairs) for i in (0, 1))
        print(f"  {name}: {second / first:.3f}x ({1000 * second:.0f} ms against {1000 * first:.0f} ms)")
