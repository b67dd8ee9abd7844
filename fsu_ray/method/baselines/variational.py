"""Variational Bayesian unlearning: EUBO and RKL (Nguyen, Low and Jaillet, NeurIPS 2020), for any Gaussian posterior.

Both want q(u) close to p(u | D_r), which is q_full(u) / p(D_e | u) up to a constant, and see nothing of D_r: EUBO
minimises KL(q || .), RKL minimises KL(. || q). With 0 < lambda both count only those u where q_full(u) > lambda max
q_full, since elsewhere q_full stands for nothing that was learned. Everything is in the precision of `full`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fsu_ray.errors import InvalidConfig

BOTTOMLESS = 1e6
"""EUBO in nats, below zero, from which on it is taken to have no minimum."""

LogLikelihood = Callable[[Tensor], Tensor]
"""log p(D_e | u) of draws u: (S, D) -> (S,)."""


@dataclass(frozen=True)
class Gaussian:
    """N(mean, tril tril^T): mean (D,), tril (D, D) lower triangular with a positive diagonal."""

    mean: Tensor
    tril: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """From a covariance (D, D); raises InvalidConfig where that is not positive definite."""
        tril, broken = torch.linalg.cholesky_ex(covariance)
        if int(broken):
            raise InvalidConfig("this posterior is not a proper Gaussian: its covariance is not positive definite")
        return cls(mean, tril)

    @property
    def covariance(self) -> Tensor:
        """(D, D)."""
        return self.tril @ self.tril.T

    @property
    def precision(self) -> Tensor:
        """The inverse of the covariance, (D, D)."""
        return torch.cholesky_inverse(self.tril)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) in nats, a scalar."""
        whitened = torch.linalg.solve_triangular(other.tril, self.tril, upper=False)
        shift = torch.linalg.solve_triangular(other.tril, (self.mean - other.mean)[:, None], upper=False)
        size = whitened.square().sum() + shift.square().sum() - len(self.mean)
        found: Tensor = size / 2 - whitened.diagonal().log().sum()
        return found


def eubo(full: Gaussian, expected: Callable[[Gaussian], Tensor]) -> Gaussian:
    """EUBO at lambda = 0 to its optimum: the q that minimises `expected(q)` + KL(q || full), by L-BFGS.

    `expected` is E_q[log p(D_e | u)], differentiable in q's mean and tril. Raises InvalidConfig where there is no
    minimum: D_e then says more than all of q_full.
    """
    white = _Whitened(full)
    optimiser = torch.optim.LBFGS(
        white.parameters, max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = expected(white.posterior()) + white.kl()
        if not float(value.detach()) > -BOTTOMLESS:
            raise _no_minimum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    last = math.inf
    for _ in range(5):  # each call forgets the curvature of the one before
        value = float(optimiser.step(loss).detach())  # type: ignore[no-untyped-call]
        if last - value < 1e-12:
            break
        last = value
    return white.found()


@dataclass(frozen=True)
class Descent:
    """How `eubo_sampled` descends: Adam at `lr`, by a cosine down to a hundredth of it; the last fifth is averaged."""

    steps: int = 2500
    samples: int = 500
    lr: float = 1e-2


def eubo_sampled(full: Gaussian, log_likelihood: LogLikelihood, cut: float, seed: int, how: Descent) -> Gaussian:
    """EUBO at lambda = `cut`: minimises E_q[1(q_full(u) > cut max q_full) log p(D_e | u)] + KL(q || full).

    No gradient goes through the indicator, as in its authors' code.
    """
    white, rng = _Whitened(full), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(white.parameters, lr=how.lr)
    kept = [torch.zeros_like(p) for p in white.parameters]
    last = max(1, how.steps // 5)
    for step in range(how.steps):
        optimiser.param_groups[0]["lr"] = how.lr * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / how.steps)))
        noise = torch.randn((how.samples, len(full.mean)), generator=rng, dtype=full.mean.dtype)
        drawn = white.draw(noise)
        inside = drawn.detach().square().sum(1) / 2 < _reach(cut)
        loss = torch.where(inside, log_likelihood(_unwhitened(full, drawn)), 0).mean() + white.kl()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step >= how.steps - last:
            for total, p in zip(kept, white.parameters, strict=True):
                total += p.detach() / last
    for p, mean in zip(white.parameters, kept, strict=True):
        p.data = mean
    return white.found()


def rkl(
    full: Gaussian, log_likelihood: LogLikelihood, cut: float, seed: int, batches: int = 1500, size: int = 1000
) -> Gaussian:
    """RKL at lambda = `cut`: the Gaussian with the moments of q_full's draws, weighted by 1 / p(D_e | u).

    The KL of a Gaussian from weighted draws is least where the moments agree, so nothing is optimised. Weights are
    normalised within each batch of `size` draws, as its authors do: where a few draws hold all the weight (a large
    D_e), that is a bias towards q_full, and part of what is compared. Raises InvalidConfig where all draws are cut.
    """
    rng = torch.Generator().manual_seed(seed)
    first, second, counted = torch.zeros_like(full.mean), torch.zeros_like(full.tril), 0
    for _ in range(batches):
        drawn = torch.randn((size, len(full.mean)), generator=rng, dtype=full.mean.dtype)
        drawn = drawn[drawn.square().sum(1) / 2 < _reach(cut)]
        if not len(drawn):
            continue
        weight = (-log_likelihood(_unwhitened(full, drawn))).softmax(0)
        first += weight @ drawn
        second += (drawn * weight[:, None]).T @ drawn
        counted += 1
    if not counted:
        raise InvalidConfig(f"lambda of {cut:g} cuts all draws away: take a lower one")
    mean = first / counted
    inner = Gaussian.of(mean, second / counted - mean.outer(mean))
    return Gaussian(_unwhitened(full, mean[None])[0], full.tril @ inner.tril)


def _reach(cut: float) -> float:
    """Half the squared Mahalanobis distance up to which the density is above `cut` of its greatest."""
    if not 0 <= cut < 1:
        raise InvalidConfig(f"lambda is a share of the greatest density, from 0 to below 1, not {cut:g}")
    return -math.log(cut) if cut else math.inf


def _unwhitened(full: Gaussian, drawn: Tensor) -> Tensor:
    return full.mean + drawn @ full.tril.T


class _Whitened:
    """A q in coordinates where `full` is N(0, I): a mean, and a tril by its diagonal's logarithm. Begins as `full`."""

    def __init__(self, full: Gaussian) -> None:
        self.full = full
        size, dtype = len(full.mean), full.mean.dtype
        self.shift = torch.zeros(size, dtype=dtype, requires_grad=True)
        self.lower = torch.zeros((size, size), dtype=dtype, requires_grad=True)
        self.diagonal = torch.zeros(size, dtype=dtype, requires_grad=True)
        self.parameters = [self.shift, self.lower, self.diagonal]

    def tril(self) -> Tensor:
        return self.lower.tril(-1) + torch.diag(self.diagonal.exp())

    def draw(self, noise: Tensor) -> Tensor:
        return self.shift + noise @ self.tril().T

    def kl(self) -> Tensor:
        size = self.tril().square().sum() + self.shift.square().sum() - len(self.shift)
        return size / 2 - self.diagonal.sum()

    def posterior(self) -> Gaussian:
        return Gaussian(self.full.mean + self.full.tril @ self.shift, self.full.tril @ self.tril())

    def found(self) -> Gaussian:
        with torch.no_grad():
            found = self.posterior()
        if not bool(found.mean.isfinite().all() and found.tril.isfinite().all()):
            raise _no_minimum()
        return found


def _no_minimum() -> InvalidConfig:
    return InvalidConfig("EUBO has no minimum here: D_e says more than all that was learned; give a lambda > 0")
