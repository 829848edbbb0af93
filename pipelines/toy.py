"""The oracle: a real `DiffusionPipeline` whose denoiser is the closed form of a Gaussian mixture.

    prior      x0 ~ sum_k w_k N(mu_k + c, s_k^2 I),  c the number that the prompt says
    marginal   x_t ~ sum_k w_k N(alpha (mu_k + c), (alpha^2 s_k^2 + sigma^2) I)
    posterior  x0 | x_t, k ~ N(mu_k + c + g_k (x_t - alpha (mu_k + c)), v_k I),
               g_k = alpha s_k^2 / (alpha^2 s_k^2 + sigma^2),  v_k = s_k^2 sigma^2 / (alpha^2 s_k^2 + sigma^2)

Posterior means, values log E[exp(lambda r(x0)) | x_t] and tilted targets of linear and quadratic rewards are exact, so
kernels, samplers, particle methods and policy gradients can be tested against known answers. Pictures are
0.5 + x / 16: an oracle reward in pixels is not clamped within 8 units of x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from t2i_align.pipelines.grid import Level, prediction_type, scheduler_kind
from t2i_align.pipelines.kernels import x0_eps_to_output

PIXELS_PER_UNIT = 1 / 16  # a picture is 0.5 + x / 16


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(mean_k, std_k^2 I) over vectors of D dimensions: `weights` (K,), `means` (K, D), `stds` (K,)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @classmethod
    def normal(cls, dims: int = 3, mean: float = 0.0, std: float = 1.0) -> Mixture:
        """One component."""
        return cls(torch.ones(1), torch.full((1, dims), mean), torch.tensor([std]))

    def mean(self) -> Tensor:
        """(D,)."""
        return (self.weights[:, None] * self.means).sum(0)

    def variance(self) -> Tensor:
        """Per dimension, (D,)."""
        second = (self.weights[:, None] * (self.means.square() + self.stds[:, None].square())).sum(0)
        return second - self.mean().square()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of `x` (..., D): (...), nats."""
        return torch.logsumexp(self._log_joint(x), -1)

    def _log_joint(self, x: Tensor) -> Tensor:
        dims = self.means.shape[-1]
        square = (x[..., None, :] - self.means).square().sum(-1) / self.stds.square()
        return self.weights.log() - 0.5 * square - dims * (self.stds.log() + 0.9189385332046727)  # ln(2 pi) / 2

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` exact draws (n, D)."""
        k = torch.multinomial(self.weights.float(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise

    def noised(self, at: Level) -> Mixture:
        """The marginal of x_t = alpha x0 + sigma eps, at one level or at one for each of the points to come (...)."""
        alpha, sigma = at.alpha[..., None], at.sigma[..., None]
        variance = (alpha * self.stds).square() + sigma.square()
        return replace(self, means=alpha[..., None] * self.means, stds=variance.sqrt())

    def posterior(self, x: Tensor, at: Level) -> Mixture:
        """x0 given points x_t (..., D): a mixture each, `weights` (..., K), `means` (..., K, D), `stds` (..., K)."""
        marginal = self.noised(at)
        gain = at.alpha[..., None] * self.stds.square() / marginal.stds.square()
        means = self.means + gain[..., None] * (x[..., None, :] - marginal.means)
        stds = self.stds * at.sigma[..., None] / marginal.stds
        return Mixture(marginal._log_joint(x).softmax(-1), means, stds)

    def denoise(self, x: Tensor, at: Level) -> Tensor:
        """E[x0 | x_t] of points (..., D)."""
        posterior = self.posterior(x, at)
        return (posterior.weights[..., None] * posterior.means).sum(-2)

    def tilt_linear(self, slope: Tensor) -> tuple[Mixture, Tensor]:
        """The target exp(slope . x) p(x) / Z for `slope` (D,), lambda included, and log Z.

        Component weights tilt by exp(slope . mu_k + s_k^2 |slope|^2 / 2), means move by s_k^2 slope.
        """
        variance = self.stds.square()
        log_weights = self.weights.log() + self.means @ slope + 0.5 * variance * slope.square().sum()
        moved = self.means + variance[..., None] * slope
        return replace(self, weights=log_weights.softmax(-1), means=moved), torch.logsumexp(log_weights, -1)

    def tilt_quadratic(self, centre: Tensor, precision: float) -> tuple[Mixture, Tensor]:
        """The target exp(-precision |x - centre|^2 / 2) p(x) / Z for `centre` (D,), lambda included, and log Z."""
        variance = self.stds.square()
        shrink = 1 / (1 + precision * variance)  # (K,)
        square = (self.means - centre).square().sum(-1)
        dims = self.means.shape[-1]
        log_weights = self.weights.log() + 0.5 * dims * shrink.log() - 0.5 * precision * shrink * square
        means = shrink[..., None] * (self.means + precision * variance[..., None] * centre)
        tilted = Mixture(log_weights.softmax(-1), means, self.stds * shrink.sqrt())
        return tilted, torch.logsumexp(log_weights, -1)

    def value_linear(self, x: Tensor, at: Level, slope: Tensor) -> Tensor:
        """V_t(x_t) = log E[exp(slope . x0) | x_t] of points (..., D): (...)."""
        return self.posterior(x, at).tilt_linear(slope)[1]

    def value_quadratic(self, x: Tensor, at: Level, centre: Tensor, precision: float) -> Tensor:
        """V_t(x_t) = log E[exp(-precision |x0 - centre|^2 / 2) | x_t] of points (..., D): (...)."""
        return self.posterior(x, at).tilt_quadratic(centre, precision)[1]


class ToyDenoiser(ModelMixin, ConfigMixin):
    """The exact network of a mixture on latents (B, 3, h, w), every pixel an independent point of three dimensions.

    `shift` (3,) is added to the estimate of x0: zero in the oracle, and the parameter that tests of training move.
    """

    @register_to_config
    def __init__(
        self,
        weights: tuple[float, ...] = (1.0,),
        means: tuple[tuple[float, float, float], ...] = ((0.0, 0.0, 0.0),),
        stds: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__()
        self.register_buffer("w", torch.tensor(weights))
        self.register_buffer("mu", torch.tensor(means))
        self.register_buffer("s", torch.tensor(stds))
        self.shift = torch.nn.Parameter(torch.zeros(3))

    @property
    def mixture(self) -> Mixture:
        """The prior under a prompt that says 0."""
        return Mixture(self.w, self.mu, self.s)

    def forward(self, x: Tensor, at: Level, said: Tensor, prediction: str) -> Tensor:
        """The exact output for latents (B, 3, h, w) at a level, under prompts that say the numbers `said` (B,)."""
        offset = said.reshape(-1, 1, 1, 1)
        points = (x - at.alpha * offset).movedim(1, -1)  # (B, h, w, 3)
        inner = Level(*(value.movedim(1, -1)[..., 0] if value.ndim else value for value in at))
        x0 = self.mixture.denoise(points, inner).movedim(-1, 1) + offset + self.shift.reshape(-1, 1, 1)
        return x0_eps_to_output(x0, (x - at.alpha * x0) / at.sigma, at, prediction)


class ToyPipeline(DiffusionPipeline):
    """Text-to-image by a closed form. A prompt is a number, `"1.5"`, added to every mean; any other text says 0.

    Args:
        denoiser: the exact network.
        scheduler: any that `read_grid` reads; the network answers in its prediction type.
        size: pictures are size x size pixels, each of them an independent point.
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser: ToyDenoiser, scheduler: Any, size: int = 1) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(size=size)
        self.prompt_calls = 0

    def encode_prompt(self, prompt: str | list[str], device: torch.device | str) -> Tensor:
        """The numbers that prompts say: (B,)."""
        self.prompt_calls += 1
        texts = [prompt] if isinstance(prompt, str) else prompt
        return torch.tensor([_number(text) for text in texts], device=device)

    def prepare_latents(self, batch: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Starting noise (B, 3, size, size), drawn unless given."""
        if latents is None:
            shape = (batch, 3, self.config.size, self.config.size)
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=self.denoiser.shift.dtype)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample like any diffusers pipeline; guidance against a prompt that says 0 where `guidance_scale` > 1."""
        said = self.encode_prompt(prompt or "", self.device) if prompt_embeds is None else prompt_embeds
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = self.prepare_latents(len(said), generator, latents)
        for t in self.scheduler.timesteps:
            x = self.scheduler.scale_model_input(latents, t) if self._scales() else latents
            at = self.level(t, x)
            output = self.denoiser(x, at, said, self.prediction)
            if guidance_scale > 1:
                blind = self.denoiser(x, at, torch.zeros_like(said), self.prediction)
                output = blind + guidance_scale * (output - blind)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        images = latents if output_type == "latent" else self.decode(latents)
        if output_type in ("pil", "np"):
            images = images.clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images) if return_dict else (images,)

    @property
    def prediction(self) -> str:
        """The prediction type of the scheduler."""
        return prediction_type(self.scheduler)

    def level(self, t: Tensor, x: Tensor) -> Level:
        """The noise level of a timestep (scalar or (B,)), from the scheduler's own definition of t."""
        t = torch.as_tensor(t, device=x.device).reshape(-1, 1, 1, 1) if torch.as_tensor(t).ndim else torch.as_tensor(t)
        if scheduler_kind(self.scheduler) == "flow":
            sigma = (t / self.scheduler.config.num_train_timesteps).to(x.dtype)
            return Level(1 - sigma, sigma)
        alphas = self.scheduler.alphas_cumprod.to(x.device, torch.float64).sqrt()
        below = t.long().clamp(max=len(alphas) - 2)
        alpha = torch.lerp(alphas[below], alphas[below + 1], t - below.double())
        return Level(alpha.to(x.dtype), (1 - alpha.square()).sqrt().to(x.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) of latents: 0.5 + x / 16."""
        return 0.5 + PIXELS_PER_UNIT * latents

    def _scales(self) -> bool:
        return scheduler_kind(self.scheduler) != "flow"


def toy_pipeline(mixture: Mixture | None = None, flow: bool = False, size: int = 1) -> ToyPipeline:
    """A toy pipeline with a DDIM (epsilon) or flow-matching scheduler; by default over unit Gaussians."""
    mixture = mixture or Mixture.normal()
    denoiser = ToyDenoiser(
        tuple(mixture.weights.tolist()), tuple(map(tuple, mixture.means.tolist())), tuple(mixture.stds.tolist())
    )
    vp = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(**vp)
    pipe = ToyPipeline(denoiser, scheduler, size)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
