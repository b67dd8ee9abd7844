"""Variational Bayesian unlearning: EUBO and RKL (Nguyen, Low and Jaillet, NeurIPS 2020), for any Gaussian posterior.

Both want q(u) close to p(u | D_r), which is q_full(u) / p(D_e | u) up to a constant, and see nothing of D_r: EUBO
minimises KL(q || .), RKL minimises KL(. || q). With 0 < lambda both count only those u where q_full(u) > lambda max
q_full, since elsewhere q_full stands for nothing that was learned. Everything is in the precision of `full`, and where
that is diagonal q is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fsu_ray.errors import InvalidConfig

BOTTOMLESS = 1e6
"""EUBO in nats, below zero, from which on it is taken to have no minimum."""

LogLikelihood = Callable[[Tensor], Tensor]
"""log p(D_e | u) of draws u: (S, D) -> (S,). May be an unbiased estimate, another at each call, for EUBO."""

Cut = float | Decimal
"""lambda. A Decimal goes where floats are 0: in D dimensions half of q_full's own draws lie beyond exp(-D / 2)."""


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
        return other.whitened(self).kl_to_standard()

    def place(self, drawn: Tensor) -> Tensor:
        """Turn draws of N(0, I) into draws of this: (S, D) -> (S, D)."""
        return self.mean + drawn @ self.tril.T

    def around(self, inner: Gaussian) -> Gaussian:
        """`inner`, given in coordinates where this is N(0, I), in the coordinates of u."""
        return Gaussian(self.mean + self.tril @ inner.mean, self.tril @ inner.tril)

    def whitened(self, other: Gaussian) -> Gaussian:
        """`other` in coordinates where this is N(0, I): the inverse of `around`."""
        both = torch.cat(((other.mean - self.mean)[:, None], other.tril), 1)
        whitened = torch.linalg.solve_triangular(self.tril, both, upper=False)
        return Gaussian(whitened[:, 0], whitened[:, 1:])

    def kl_to_standard(self) -> Tensor:
        """KL(self || N(0, I)) in nats, a scalar."""
        size = self.tril.square().sum() + self.mean.square().sum() - len(self.mean)
        return size / 2 - self.tril.diagonal().log().sum()

    def free(self) -> list[Tensor]:
        """New tensors that may take any value: the mean, the logarithm of tril's diagonal, what is below it."""
        return [self.mean.clone(), self.tril.diagonal().log(), self.tril.tril(-1).contiguous()]

    @staticmethod
    def bound(free: list[Tensor]) -> Gaussian:
        """The inverse of `free`."""
        mean, diagonal, lower = free
        return Gaussian(mean, lower.tril(-1) + torch.diag(diagonal.exp()))

    @staticmethod
    def second(drawn: Tensor, weight: Tensor) -> Tensor:
        """The second moments that `matched` takes, of draws (S, D) with weights (S,)."""
        return (drawn * weight[:, None]).T @ drawn

    @staticmethod
    def matched(mean: Tensor, second: Tensor) -> Gaussian:
        """The Gaussian with these moments; raises InvalidConfig where there is none."""
        return Gaussian.of(mean, second - mean.outer(mean))


@dataclass(frozen=True)
class Diagonal:
    """N(mean, diag(scale^2)): mean and scale (D,), scale > 0; a mean-field posterior, for any dimension."""

    mean: Tensor
    scale: Tensor

    def kl(self, other: Diagonal) -> Tensor:
        """KL(self || other) in nats, a scalar."""
        return other.whitened(self).kl_to_standard()

    def place(self, drawn: Tensor) -> Tensor:
        """Turn draws of N(0, I) into draws of this: (S, D) -> (S, D)."""
        return self.mean + drawn * self.scale

    def around(self, inner: Diagonal) -> Diagonal:
        """`inner`, given in coordinates where this is N(0, I), in the coordinates of u."""
        return Diagonal(self.mean + self.scale * inner.mean, self.scale * inner.scale)

    def whitened(self, other: Diagonal) -> Diagonal:
        """`other` in coordinates where this is N(0, I): the inverse of `around`."""
        return Diagonal((other.mean - self.mean) / self.scale, other.scale / self.scale)

    def kl_to_standard(self) -> Tensor:
        """KL(self || N(0, I)) in nats, a scalar."""
        return (self.scale.square() + self.mean.square() - 1).sum() / 2 - self.scale.log().sum()

    def free(self) -> list[Tensor]:
        """New tensors that may take any value: the mean, the logarithm of the scale."""
        return [self.mean.clone(), self.scale.log()]

    @staticmethod
    def bound(free: list[Tensor]) -> Diagonal:
        """The inverse of `free`."""
        mean, scale = free
        return Diagonal(mean, scale.exp())

    @staticmethod
    def second(drawn: Tensor, weight: Tensor) -> Tensor:
        """The second moments that `matched` takes, of draws (S, D) with weights (S,)."""
        return weight @ drawn.square()

    @staticmethod
    def matched(mean: Tensor, second: Tensor) -> Diagonal:
        """The Gaussian with these moments; raises InvalidConfig where there is none."""
        if not bool((second > mean.square()).all()):
            raise InvalidConfig("these draws do not vary in every dimension: take more batches")
        return Diagonal(mean, (second - mean.square()).sqrt())


AnyGaussian = TypeVar("AnyGaussian", Gaussian, Diagonal)


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
        value = expected(white.posterior()) + white.inner().kl_to_standard()
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
    return white.result()


@dataclass(frozen=True)
class Descent:
    """How `eubo_sampled` descends: Adam at `lr`, by a cosine down to a hundredth of it; the last fifth is averaged."""

    steps: int = 2500
    samples: int = 500
    lr: float = 1e-2


def eubo_sampled(
    full: AnyGaussian,
    log_likelihood: LogLikelihood,
    cut: Cut,
    seed: int,
    how: Descent,
    start: AnyGaussian | None = None,
) -> AnyGaussian:
    """EUBO at lambda = `cut`: minimises E_q[1(q_full(u) > cut max q_full) log p(D_e | u)] + KL(q || full).

    No gradient goes through the indicator, as in its authors' code. It goes down from `start`, `full` by default. With
    a prior for `full` and -log p(D | u) for the likelihood this is learning: minus the ELBO.
    """
    white, rng, reach = _Whitened(full, start), torch.Generator().manual_seed(seed), _reach(cut)
    optimiser = torch.optim.Adam(white.parameters, lr=how.lr)
    means = [torch.zeros_like(p) for p in white.parameters]
    last = max(1, how.steps // 5)
    for step in range(how.steps):
        optimiser.param_groups[0]["lr"] = how.lr * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / how.steps)))
        inner = white.inner()
        drawn = inner.place(_noise(full, how.samples, rng))
        inside = drawn.detach().square().sum(1) / 2 < reach
        loss = torch.where(inside, log_likelihood(full.place(drawn)), 0).mean() + inner.kl_to_standard()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step >= how.steps - last:
            for total, p in zip(means, white.parameters, strict=True):
                total += p.detach() / last
    for p, mean in zip(white.parameters, means, strict=True):
        p.data = mean
    return white.result()


def rkl(
    full: AnyGaussian, log_likelihood: LogLikelihood, cut: Cut, seed: int, batches: int = 1500, size: int = 1000
) -> AnyGaussian:
    """RKL at lambda = `cut`: the Gaussian with the moments of q_full's draws, weighted by 1 / p(D_e | u).

    The KL of a Gaussian from weighted draws is least where the moments agree, so nothing is optimised. Weights are
    normalised within each batch of `size` draws, as its authors do: where a few draws hold all the weight (a large
    D_e), that is a bias towards q_full, and part of what is compared. Raises InvalidConfig where all draws are cut.
    """
    first, second, counted = torch.zeros_like(full.mean), torch.zeros(()), 0
    for drawn, weight in _weighted(full, log_likelihood, cut, seed, batches, size):
        first += weight @ drawn
        second = second + full.second(drawn, weight)
        counted += 1
    return full.around(full.matched(first / counted, second / counted))


def effective_draws(
    full: Gaussian | Diagonal, log_likelihood: LogLikelihood, cut: Cut, seed: int, batches: int = 10, size: int = 1000
) -> float:
    """The effective sample size of `rkl`'s weights in a batch, 1 / sum of their squares: the mean of `batches`."""
    sizes = [float(1 / w.square().sum()) for _, w in _weighted(full, log_likelihood, cut, seed, batches, size)]
    return sum(sizes) / len(sizes)


def _weighted(
    full: Gaussian | Diagonal, log_likelihood: LogLikelihood, cut: Cut, seed: int, batches: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of draws within the cut, whitened, (n, D), with weights that sum to 1, (n,)."""
    rng, reach, counted = torch.Generator().manual_seed(seed), _reach(cut), 0
    for _ in range(batches):
        drawn = _noise(full, size, rng)
        drawn = drawn[drawn.square().sum(1) / 2 < reach]
        if not len(drawn):
            continue
        yield drawn, (-log_likelihood(full.place(drawn))).softmax(0)
        counted += 1
    if not counted:
        raise InvalidConfig(f"lambda of {cut:g} cuts all draws away: take a lower one")


def _noise(full: Gaussian | Diagonal, number: int, rng: torch.Generator) -> Tensor:
    return torch.randn((number, len(full.mean)), generator=rng, dtype=full.mean.dtype).to(full.mean.device)


def _reach(cut: Cut) -> float:
    """Half the squared Mahalanobis distance up to which the density is above `cut` of its greatest."""
    if not 0 <= cut < 1:
        raise InvalidConfig(f"lambda is a share of the greatest density, from 0 to below 1, not {cut:g}")
    return -float(Decimal(cut).ln()) if cut else math.inf


class _Whitened(Generic[AnyGaussian]):
    """A q that is fitted, in coordinates where `full` is N(0, I). Begins as `start`, or as `full`."""

    def __init__(self, full: AnyGaussian, start: AnyGaussian | None = None) -> None:
        self.full: AnyGaussian = full
        self.parameters = [p.requires_grad_() for p in full.whitened(start or full).free()]

    def inner(self) -> AnyGaussian:
        return self.full.bound(self.parameters)

    def posterior(self) -> AnyGaussian:
        return self.full.around(self.inner())

    def result(self) -> AnyGaussian:
        """The fitted q, without gradients; raises InvalidConfig where it is not finite."""
        with torch.no_grad():
            posterior = self.posterior()
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise _no_minimum()
        return posterior


def _no_minimum() -> InvalidConfig:
    return InvalidConfig("EUBO has no minimum here: D_e says more than all that was learned; give a lambda > 0")
