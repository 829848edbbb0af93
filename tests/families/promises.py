"""What the driver promises of every family: each promise measures how far a family is from keeping it."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import diffusers as d
import torch

from t2i_align.pipelines.kernels import ddim, ode
from tests.families.derivatives import derivative
from tests.families.subject import Subject, modules


class NotApplicable(Exception):
    """A promise that says nothing about a family."""


class Promise(NamedTuple):
    """`measure` gives a number that must not exceed `bound`."""

    says: str
    bound: float
    measure: Callable[[Subject], float]

    def bound_of(self, s: Subject) -> float:
        """The bound on a subject: where rounding is allowed at all, one of its number type is.

        CPUs with kernels of their own for float16 round otherwise for other batch sizes. What a family says it cannot
        do is held to the bound of all.
        """
        told = any(self is PROMISES[name] for name in s.family.cannot)
        return self.bound if told or not self.bound else max(self.bound, torch.finfo(s.driver.dtype).eps)


def apart(first, second) -> float:
    """The largest difference."""
    return float((first.detach().double() - second.detach().double()).abs().max())


def replay(s: Subject) -> float:
    trajectory = s.trajectory
    assert trajectory.steps == s.steps
    assert trajectory.x.isfinite().all()
    assert trajectory.log_prob.isfinite().all()
    assert trajectory.log_prob.dtype == torch.float32
    again = [
        s.step(row).q.log_prob(trajectory.x[:, row + 1]) for row in range(s.steps)
    ]  # with gradients, as in training
    return apart(torch.stack(again, 1), trajectory.log_prob)


def split(s: Subject) -> float:
    worst = 0.0
    with torch.no_grad():
        for row in range(s.steps):
            whole = s.step(row).q.mean
            parts = torch.cat([s.step(row, rows).q.mean for rows in (slice(0, 2), slice(2, 3))])
            worst = max(worst, apart(whole, parts) / float(whole.abs().max()))
    return worst


def ids(s: Subject) -> float:
    alone = s.driver.rollout(s.cond[[2]], s.steps, ddim(1.0), seed=1, ids=[2])
    return apart(alone.x[0], s.trajectory.x[2]) / float(s.trajectory.x.abs().max())


def native(s: Subject) -> float:
    return apart(s.driver.generate(s.cond, s.steps, seed=1), s.images)


def decode(s: Subject) -> float:
    seen: list[torch.Tensor] = []
    options = {"output_type": "latent"}
    if "callback_on_step_end" in s.driver.accepts:  # the latents of the loop, before a pipeline unpacks them
        options["callback_on_step_end"] = lambda pipe, row, t, values: seen.append(values["latents"]) or values
    latents = s.bare(**options)
    images = s.driver.decode(seen[-1] if seen else latents)
    assert images.min() >= 0
    assert images.max() <= 1
    return apart(images, s.images)


def latent_gradient(s: Subject) -> float:
    return derivative(s, of_weights=False)


def weight_gradient(s: Subject) -> float:
    return derivative(s, of_weights=True)


def decoder_gradient(s: Subject) -> float:
    x = s.trajectory.x[:, -1].clone().requires_grad_()
    s.driver.decode(x).mean().backward()
    return float(not x.grad.abs().sum() > 0)


def bfloat16(s: Subject) -> float:
    return in_half(s, torch.bfloat16)


def float16(s: Subject) -> float:
    return in_half(s, torch.float16)


def in_half(s: Subject, dtype: torch.dtype) -> float:
    twin = Subject(s.twin(dtype).family._replace(steps=min(s.steps, 2)))
    try:
        return replay(twin)
    except RuntimeError as error:
        reason = f"diffusers itself cannot compute it in {dtype} on CPU: {error}"
    try:
        twin.bare(output_type="latent")
    except RuntimeError as error:
        raise NotApplicable(reason) from error
    raise AssertionError(reason)


def rows(s: Subject) -> float:
    at = torch.tensor([0, s.steps // 2, s.steps - 1])
    x = torch.stack([s.trajectory.x[i, row] for i, row in enumerate(at.tolist())])
    with torch.no_grad():
        together = s.driver.predict(x, at, s.cond, s.steps)
        each = torch.stack([s.driver.predict(x, row, s.cond, s.steps)[i] for i, row in enumerate(at.tolist())])
    return apart(together, each) / float(each.abs().max())


def solver(s: Subject) -> float:
    if s.driver.grid(s.steps).linear:
        if not isinstance(s.pipe.scheduler, d.FlowMatchEulerDiscreteScheduler):
            raise NotApplicable("its scheduler is no FlowMatchEuler")
        return apart(s.driver.generate(s.cond, s.steps, ode(), seed=1), s.driver.generate(s.cond, s.steps, seed=1))
    worst = 0.0
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    for scheduler, kernel in ((d.DDIMScheduler, ddim(0.0)), (d.EulerDiscreteScheduler, ode())):
        other = s.with_scheduler(scheduler.from_config(s.pipe.scheduler.config, **options))
        mine, theirs = (other.driver.generate(other.cond, s.steps, k, seed=1) for k in (kernel, "native"))
        worst = max(worst, apart(mine, theirs))
    return worst


def encoded_once(s: Subject) -> float:
    encoders = need_encoders(s)
    seen: dict[str, int] = dict.fromkeys(encoders, 0)
    hooks = []
    for name, encoder in encoders.items():

        def count(module, args, options, name=name):
            seen[name] += len(options["input_ids"] if "input_ids" in options else args[0])

        hooks.append(encoder.register_forward_pre_hook(count, with_kwargs=True))
    first, second, *_ = s.said["prompt"]
    cond = s.driver.encode([first, second, first])
    needed = 2 * 2  # two different prompts, two branches of guidance
    assert len(cond.encoded) == 2
    assert all(0 < number <= needed for number in seen.values())
    before = dict(seen)
    x = s.driver.rollout(cond, s.steps).x
    s.driver.predict(x[:, 0], 0, cond, s.steps)
    s.driver.decode(x[:, -1])
    s.driver.generate(cond, s.steps)
    for hook in hooks:
        hook.remove()
    return sum(seen.values()) - sum(before.values())


def negative(s: Subject) -> float:
    need_encoders(s)
    if "negative_prompt" not in s.driver.accepts:
        raise NotApplicable("the pipeline takes no negative prompt")
    against = "a blue star"
    cond = s.driver.encode(s.said["prompt"], negative=against)
    theirs = s.bare(negative_prompt=[against] * len(cond))
    return apart(s.driver.generate(cond, s.steps, seed=1), theirs)


def need_encoders(s: Subject) -> dict[str, torch.nn.Module]:
    if s.family.embeds is not None:
        raise NotApplicable("tested with ready embeddings")
    return {name: part for name, part in modules(s.pipe).items() if name.startswith("text_encoder")}


def nested(s: Subject) -> float:
    """Of a rollout with calls of another guidance inside."""

    def other(row, step, x):
        s.driver.predict(x, row, s.cond, s.steps, **s.unguided)

    return apart(s.driver.rollout(s.cond, s.steps, ddim(1.0), seed=1, on_step=other).x, s.trajectory.x)


def unchanged(s: Subject) -> float:
    """Number of differences in the user's pipeline and in torch's random state, after success and failure."""
    before, state = snapshot(s.pipe), torch.get_rng_state()
    fresh = Subject(s.family)  # reads its grids again
    nested(fresh)
    x = fresh.trajectory.x
    fresh.driver.decode(x[:, -1])
    fresh.driver.generate(fresh.cond, s.steps)
    fail(type(fresh.driver.network), lambda: fresh.driver.predict(x[:, 0], 0, fresh.cond, s.steps))
    if (vae := getattr(s.pipe, "vae", None)) is not None:
        fail(type(vae.decoder), lambda: fresh.driver.decode(x[:, -1]))
        fail(type(vae.decoder), lambda: fresh.driver.generate(fresh.cond, s.steps))
    after = snapshot(s.pipe)
    differences = before.keys() ^ after.keys() | {name for name in before if before[name] != after.get(name)}
    return len(differences) + int(not torch.equal(state, torch.get_rng_state()))


class OnPurpose(Exception):
    """A failure inside a call."""


@torch.no_grad()
def fail(kind: type, call: Callable[[], object]) -> None:
    """Let a call of the driver fail in a module of a kind."""

    def broken(module, args):
        if type(module) is kind:
            raise OnPurpose

    hook = torch.nn.modules.module.register_module_forward_pre_hook(broken)
    try:
        call()
    except OnPurpose:
        return
    finally:
        hook.remove()
    raise AssertionError(f"No {kind.__name__} ran that was to fail.")


def snapshot(pipe) -> dict[str, object]:
    """What a user could see of a pipeline, in comparable form."""
    seen: dict[str, object] = {f"attribute {name}": id(value) for name, value in vars(pipe).items()}
    seen |= {f"config {name}": str(value) for name, value in pipe.config.items()}
    seen |= {f"scheduler {name}": str(value) for name, value in vars(pipe.scheduler).items()}
    for name, module in modules(pipe).items():
        seen |= {f"{name} {key}": (str(p.dtype), p.requires_grad, p._version) for key, p in module.named_parameters()}
        seen[f"{name} mode"] = (module.training, "forward" in vars(module))
    return copy.deepcopy(seen)


PROMISES = {
    "replay": Promise("a stored trajectory has its log-probs again (ratio exactly 1)", 0.0, replay),
    "bf16": Promise("the same in bfloat16 weights and latents", 0.0, bfloat16),
    "fp16": Promise("the same in float16", 0.0, float16),
    "split": Promise("a split batch changes rounding alone (relative)", 1e-5, split),
    "ids": Promise("a sample depends on its id, not on its batch (relative)", 1e-4, ids),
    "native": Promise("`generate(kernel='native')` is the pipeline's own image", 0.0, native),
    "decode": Promise("`decode` is the pipeline's own image", 0.0, decode),
    "solver": Promise("`ddim(0)` and `ode` are diffusers' DDIM, Euler and FlowMatchEuler images", 1e-4, solver),
    "rows": Promise("samples may be at different rows of the grid (relative)", 1e-5, rows),
    "d/dx": Promise("a directional derivative in the latents, float64 (relative error)", 1e-4, latent_gradient),
    "d/dw": Promise("the same in the network's weights", 1e-4, weight_gradient),
    "d/dz": Promise("gradients flow through `decode` (0: yes)", 0.0, decoder_gradient),
    "once": Promise("text-encoder rows run again after `encode`", 0, encoded_once),
    "negative": Promise("`encode(negative=...)` gives the pipeline's own negative_prompt image", 0.0, negative),
    "nested": Promise("calls inside a run do not disturb it", 0.0, nested),
    "unchanged": Promise("things changed in your pipeline or torch's random state, after failure too", 0, unchanged),
}
