"""Scores of sets of images, over the features (n, D) of any extractor: FID, CMMD, Vendi, and what each image adds.

Contributions are leave-one-out: by how much the set would be worse without the image. They come from one
eigendecomposition for all images: removing a row x changes a Gram or scatter matrix by a rank-one term, for which
`det(A - u u' + t) = det(A + t) g(t)` with `g(t) = 1 - sum_j z_j^2 / (l_j + t)`, eigenvalues l of A and z = V'u.
Spectral sums follow from g by one-dimensional integrals (derivations beside them), to about ten digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t2i_align.rewards.compose import exact
from t2i_align.rewards.expression import RewardError

RANK = 1e-13  # eigenvalues below this share of the largest are rounding
SPAN, NODES = 36.0, 600  # trapezoid rule in log t over [-2 SPAN, 2 SPAN]: its error falls as exp(-2 pi^2 / step)


def frechet(a: Tensor, b: Tensor, shrink: float = 0.0) -> Tensor:
    """Frechet distance of the Gaussians fitted to features (n, D) and (m, D); FID with Inception's pool3.

    `|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, covariances with ddof 1; float64. Biased upwards for few
    samples (n should exceed D): compare equal n only.

    Args:
        a: features of a set of 2 or more.
        b: features of the set it is compared with.
        shrink: added to the diagonal of both covariances.
    """
    a, b = _checked(a, 2), _checked(b, 2)
    cov_a, cov_b = (_covariance(x) + shrink * torch.eye(x.shape[1]).to(x) for x in (a, b))
    root_b = _root(cov_b)
    values = torch.linalg.eigvalsh(root_b @ cov_a @ root_b)
    cross = values[values > RANK * values[-1]].sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def cmmd(a: Tensor, b: Tensor, sigma: float = 10.0) -> Tensor:
    """1000 times the squared maximum mean discrepancy of L2-normalised features (n, D), (m, D): arXiv 2401.09603.

    Kernel `exp(-|x - y|^2 / (2 sigma^2))`, biased V-statistic. With sigma = 10 about 10 |mean_a - mean_b|^2.
    """
    a, b = _unit(_checked(a, 1)), _unit(_checked(b, 1))
    return 1000 * (_kernel(a, a, sigma).mean() + _kernel(b, b, sigma).mean() - 2 * _kernel(a, b, sigma).mean())


def vendi(features: Tensor) -> Tensor:
    """Effective number of different images, exp(entropy of the eigenvalues of K / n), K the cosines: arXiv 2210.02410.

    1 for copies, n for orthogonal features (n, D).
    """
    unit = _unit(_checked(features, 1))
    gram = unit.T @ unit if len(unit) > unit.shape[1] else unit @ unit.T  # one spectrum
    shares = torch.linalg.eigvalsh(gram / len(unit)).clamp(min=0)
    return torch.special.entr(shares).sum().exp()


def vendi_contributions(features: Tensor) -> Tensor:
    """(n,) `vendi(all) - vendi(all but i)`: how much diversity each image adds.

    Entropies need sum l log l of A' = A - u u', A = F'F with unit rows u of F. From
    `l log l = integral_0^inf (l / (1 + t) - 1 + t / (l + t)) dt` the change is
    `integral (-1 / (1 + t) + t g'(t) / g(t)) dt`.
    """
    unit = _unit(_checked(features, 2))
    wide = len(unit) <= unit.shape[1]
    values, weights = _spectrum(unit @ unit.T) if wide else _spectrum(unit.T @ unit, unit)
    t, log_g, slope = _characteristic(values, weights)
    change = _integrate((t * slope * (-log_g).exp() - 1 / (1 + t)) * t)
    n = len(unit)
    whole = -torch.special.entr(values).sum()
    rest = (whole + change) / (n - 1)
    return vendi(features) - (math.log(n - 1) - rest).exp()


def frechet_contributions(a: Tensor, b: Tensor, shrink: float = 0.0) -> Tensor:
    """(n,) `frechet(all but i, b) - frechet(all, b)`: how much each image of a (n, D), n >= 3, brings it nearer to b.

    With R = S_b^(1/2), the trace of (R S_a R)^(1/2) changes by
    `(1 / 2 pi) integral_0^inf t^(-1/2) log g(t) dt`, as `l^(1/2) = (1 / pi) integral t^(-1/2) l / (l + t) dt`.
    """
    a, b = _checked(a, 3), _checked(b, 2)
    n, eye = len(a), torch.eye(a.shape[1]).to(a)
    off = a - a.mean(0)
    scatter, cov_b = off.T @ off, _covariance(b) + shrink * eye
    root_b = _root(cov_b)
    removed = (n / (n - 1) / (n - 2)) ** 0.5 * off  # S_-i = scatter / (n - 2) - removed_i removed_i'
    values, weights = _spectrum(root_b @ (scatter / (n - 2) + shrink * eye) @ root_b, removed @ root_b)
    t, log_g, _ = _characteristic(values, weights)
    change = _integrate(log_g * t.sqrt()) / (2 * torch.pi)
    cross = values.sqrt().sum() + change
    trace = scatter.trace() / (n - 2) - removed.square().sum(1) + shrink * a.shape[1]
    means = (a.mean(0) - off / (n - 1) - b.mean(0)).square().sum(1)
    return means + trace + cov_b.trace() - 2 * cross - frechet(a, b, shrink)


def cmmd_contributions(a: Tensor, b: Tensor, sigma: float = 10.0) -> Tensor:
    """(n,) `cmmd(all but i, b) - cmmd(all, b)`, exact sums without row i; n >= 2."""
    a, b = _unit(_checked(a, 2)), _unit(_checked(b, 1))
    n = len(a)
    inner, outer = _kernel(a, a, sigma), _kernel(a, b, sigma).mean(1)
    within = (inner.sum() - 2 * inner.sum(1) + inner.diagonal()) / (n - 1) ** 2
    across = (outer.sum() - outer) / (n - 1)
    return 1000 * (within - inner.mean() - 2 * (across - outer.mean()))


def _spectrum(matrix: Tensor, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (r,) above rounding, and squared projections (n, r) of `removed` (n, D) on their vectors.

    Without `removed`, `matrix` is F F' (n, n) instead of F'F: the same spectrum, and F'F's vectors are F'U l^(-1/2), so
    that the rows of F project to U l^(1/2).
    """
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > RANK * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values, values * vectors.square() if removed is None else (removed @ vectors).square()


def _characteristic(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes t (NODES,), log g(t) (n, NODES) without cancellation at either end, and g'(t) (n, NODES).

    Near 0, `g(t) = g(0) + t sum_j z_j^2 / (l_j (l_j + t))`, where g(0) is 0 if the removal lowers the rank.
    """
    top = values[-1:].sum()  # 0 where nothing varies
    t = torch.linspace(-2 * SPAN, 2 * SPAN, NODES, dtype=values.dtype, device=values.device).exp() * top
    at_zero = 1 - (weights / values).sum(1)
    at_zero = torch.where(at_zero < 1e-9, 0.0, at_zero)[:, None]
    inverse = 1 / (values[:, None] + t)  # (r, NODES)
    gone = weights @ inverse  # 1 - g
    near_zero = at_zero + t * ((weights / values) @ inverse)
    log_g = torch.where(gone < 0.5, torch.log1p(-gone.clamp(max=0.5)), near_zero.log())
    return t, log_g, weights @ inverse.square()


def _integrate(values: Tensor) -> Tensor:
    """The integral over log t of values (n, NODES)."""
    return values.sum(1) * (4 * SPAN / (NODES - 1))


def _checked(features: Tensor, least: int) -> Tensor:
    if features.ndim != 2 or len(features) < least:
        raise RewardError(f"Expected features (n, D) of {least} or more images but got {tuple(features.shape)}.")
    return exact(features)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)


def _covariance(features: Tensor) -> Tensor:
    off = features - features.mean(0)
    return off.T @ off / (len(features) - 1)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    return (-torch.cdist(a, b).square() / (2 * sigma**2)).exp()
