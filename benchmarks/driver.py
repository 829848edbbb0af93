"""What the driver costs: medians of alternating pairs in one run, on tiny-sd at batch 16 and 20 steps.

    python benchmarks/driver.py [PAIRS]

`sampling` compares `generate(kernel="ode")` with the bare pipeline, `recording` a rollout that keeps every latent and
log-probability, `predict` one guided network call with the same call by hand.
"""

import sys
import time
from statistics import median

import torch

from t2i_align.pipelines import Driver, ddim, load_pipeline, ode

BATCH, STEPS, GUIDANCE = 16, 20, 3.0
PAIRS = int(sys.argv[1]) if len(sys.argv) > 1 else 7

pipe = load_pipeline("tiny-sd")
driver = Driver(pipe, guidance_scale=GUIDANCE)
prompts = ["a red circle left of a blue square"] * BATCH
cond = driver.encode(prompts)
positive, negative = cond.call(0)
embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
latents = driver.start(cond, STEPS)
t = driver.grid(STEPS).t[5]


@torch.no_grad()
def bare(output_type="pt"):
    pipe(latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type=output_type, **embeds)


@torch.no_grad()
def by_hand():
    blind, told = pipe.unet(torch.cat([latents] * 2), t, torch.cat([negative, positive])).sample.chunk(2)
    return blind + GUIDANCE * (told - blind)


@torch.no_grad()
def predict():
    driver.predict(latents, 5, cond, STEPS)


CASES = {
    "sampling": (bare, lambda: driver.generate(cond, STEPS, ode(), batch_size=BATCH)),
    "recording": (lambda: bare("latent"), lambda: driver.rollout(cond, STEPS, ddim(1.0), batch_size=BATCH)),
    "predict": (by_hand, predict),
}


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


for name, (base, ours) in CASES.items():
    base(), ours()
    pairs = [(seconds(base), seconds(ours)) for _ in range(PAIRS)]
    first, second = (median(pair[i] for pair in pairs) for i in (0, 1))
    print(f"{name}: {second / first:.3f}x ({1000 * second:.0f} ms against {1000 * first:.0f} ms, {PAIRS} pairs)")
