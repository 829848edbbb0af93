"""What steering costs beyond what it asks for, alternating in one run on tiny-sd.

    python benchmarks/steering.py [PAIRS]

`fk` compares Feynman-Kac steering with as many independent samples by the same kernel plus the decodes and rewards that
it asked for, done by themselves. `reno` compares an iteration of noise optimisation with the forward and backward pass
of generator, decoder and scorer by hand, at one step. `memory` is the peak of the process (allocated by torch on a
GPU) for fk at a fixed chunk size, above what the networks hold, each number of particles in a process of its own.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from t2i_align.pipelines import Driver, ddim, load_pipeline, ode
from t2i_align.prompts import Prompts
from t2i_align.rewards import load_reward
from t2i_align.steering import Ctx, load_method

STEPS, PARTICLES, CHUNK, GUIDANCE = 20, 16, 8, 1.5
ITERATIONS, BATCH = 5, 4
PROMPT = "a red circle left of a blue square"


def context(reward, steps=STEPS, kernel=None):
    driver = Driver(load_pipeline("tiny-sd"), guidance_scale=GUIDANCE)
    return Ctx(driver, load_reward(reward), steps, kernel, max_batch=CHUNK, decode_batch=CHUNK)


def fk(particles=PARTICLES):
    ctx, method, prompts = context("verifier"), load_method("fk", particles=particles), Prompts.of(PROMPT)
    asked = len(method.schedule(ctx.rows)) + 1
    ids, many = ctx.ids(prompts, particles), prompts.repeat(particles)

    @torch.no_grad()
    def independent():
        cond = ctx.driver.encode(prompts).repeat(particles)
        made = ctx.driver.rollout(cond, STEPS, ddim(1.0), ids=ids, batch_size=CHUNK)
        for _ in range(asked):
            ctx.reward.scores(ctx.driver.decode(made.x[:, -1], CHUNK), many)

    return independent, lambda: method(ctx, prompts)


def reno():
    ctx = context("tiny_pick", steps=1, kernel=ode())
    method, prompts = load_method("reno", particles=BATCH, iterations=ITERATIONS), Prompts.of(PROMPT)
    many, driver = prompts.repeat(BATCH), ctx.driver
    z = ctx.start(ctx.encode(many), list(range(BATCH)))

    def by_hand():
        cond = driver.encode(prompts).repeat(BATCH)
        for _ in range(ITERATIONS):
            x = z.clone().requires_grad_()
            latents = driver.unroll(x, cond, 1, ode(), checkpointing=False)
            images = driver.decode(latents, CHUNK, straight_through=True)
            torch.autograd.grad(ctx.reward.scores(images, many).total.sum(), x)
        with torch.no_grad():  # the final pictures
            ctx.reward.scores(driver.decode(latents.detach(), CHUNK), many)

    return by_hand, lambda: method(ctx, prompts)


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(name, base, ours, pairs):
    base(), ours()
    found = [(seconds(base), seconds(ours)) for _ in range(pairs)]
    first, second = (median(pair[i] for pair in found) for i in (0, 1))
    ratio = median(b / a for a, b in found)
    print(f"{name}: {ratio:.3f}x, median of {pairs} pairs ({1000 * second:.0f} ms against {1000 * first:.0f} ms)")


def peak(particles):
    """MiB above what is held after a first small run."""
    fk(CHUNK)[1]()
    _, steer = fk(particles)
    if torch.cuda.is_available():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steer()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, Linux
    held = resident("VmRSS")
    steer()
    return resident("VmHWM") - held


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak(int(sys.argv[2])))
        sys.exit()
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    compare(f"fk, {PARTICLES} particles", *fk(), pairs)
    compare(f"reno, {ITERATIONS} iterations of {BATCH}", *reno(), pairs)
    for particles in (8, 32, 128):
        command = [sys.executable, __file__, "--peak", str(particles)]
        print(f"memory, {particles} particles: {float(subprocess.check_output(command)):.0f} MiB")
