"""The sparse GP classifier of the moons (section 4.1), with a full Gaussian posterior over its inducing values.

p(y = 1 | x) = E_q[sigmoid(f(x))], f(x) = k_U(x)^T Kuu^-1 u, u ~ q; the prior is N(0, Kuu). The kernel is
s exp(-sum_d l_d (x_d - x'_d)^2 / 2) with nothing learned. Expectations are by Gauss-Hermite quadrature and the fit is
natural-gradient variational inference, so that everything here is deterministic. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fsu_ray.errors import InvalidData, RunFailed
from fsu_ray.method.baselines.variational import Gaussian

NODES = 32
DAMPING = 0.8
PATIENCE = 500


@dataclass(frozen=True)
class SparseGP:
    """A classifier of points (N, D) into two classes, by `inducing` inputs (M, D) and a `posterior` of dimension M.

    `scale` is s and `precisions` (D,) are l of the kernel.
    """

    inducing: Tensor
    scale: float
    precisions: Tensor
    posterior: Gaussian | None = None

    @property
    def q(self) -> Gaussian:
        """The posterior, the prior where there is none."""
        return self.posterior or self.prior

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, D), (M, D) -> (N, M)."""
        far = (self.precisions * (a[:, None] - b[None]).square()).sum(-1)
        return self.scale * torch.exp(-far / 2)

    @cached_property
    def prior(self) -> Gaussian:
        """N(0, Kuu)."""
        return Gaussian.of(torch.zeros(len(self.inducing), dtype=torch.float64), self.kernel(*[self.inducing] * 2))

    def features(self, x: Tensor) -> Tensor:
        """phi(x) = L^-1 k_U(x), with L L^T = Kuu: (N, D) -> (N, M)."""
        solved: Tensor = torch.linalg.solve_triangular(self.prior.tril, self.kernel(self.inducing, x), upper=False)
        return solved.T

    def project(self, x: Tensor) -> Tensor:
        """The rows a with f(x) = a^T u: (N, D) -> (N, M)."""
        solved: Tensor = torch.linalg.solve_triangular(self.prior.tril.T, self.features(x).T, upper=True)
        return solved.T

    def probability(self, x: Tensor) -> Tensor:
        """p(y = 1 | x): (N, D) -> (N,); differentiable in x."""
        return _expect(torch.sigmoid, *self._latent(self.project(x), self.q))

    def log_likelihood(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """log p(y | x, u) summed over points (N, D) with y (N,) of 0 and 1, for draws u (S, M): (S,)."""
        return F.logsigmoid((2 * y - 1) * (u @ self.project(x).T)).sum(1)

    def expected_log_likelihood(self, x: Tensor, y: Tensor, q: Gaussian) -> Tensor:
        """E_q[log p(y | x, u)] summed over points, a scalar; differentiable in q."""
        mean, variance = self._latent(self.project(x), q)
        return _expect(F.logsigmoid, (2 * y - 1) * mean, variance).sum()

    def fitted(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> SparseGP:
        """The one whose q maximises sum_i w_i E_q[log p(y_i | u)] - KL(q || prior), from the q there is.

        x (N, D), y (N,) from 0 to 1 (a soft label counts both ways), weight (N,), 1 for each by default. Raises
        InvalidData for anything else, RunFailed where the iteration does not settle.
        """
        weight = torch.ones_like(y) if weight is None else weight
        if x.dim() != 2 or x.shape[1] != self.inducing.shape[1] or not len(x) == len(y) == len(weight):
            raise InvalidData(f"points (N, {self.inducing.shape[1]}) with as many labels are needed, not {x.shape}")
        rows, prior = self.project(x), self.prior.precision  # the prior's mean is 0
        precision, pull = self.q.precision, self.q.precision @ self.q.mean
        q, share, before = self.q, DAMPING, math.inf
        for _ in range(PATIENCE):
            mean, variance = self._latent(rows, q)
            right = _expect(torch.sigmoid, mean, variance)
            curvature = weight * _expect(lambda f: torch.sigmoid(f) * torch.sigmoid(-f), mean, variance)
            target = prior + rows.T @ (curvature[:, None] * rows)
            pulled = rows.T @ (weight * (y - right) + curvature * mean)
            precision, pull = torch.lerp(precision, target, share), torch.lerp(pull, pulled, share)
            covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
            new = Gaussian.of(covariance @ pull, covariance)
            moved = float(new.kl(q))
            if moved < 1e-12:
                return replace(self, posterior=new)
            if moved > before:  # it swings: shorter steps
                share = max(share / 2, 0.05)
            q, before = new, moved
        raise RunFailed(f"the sparse GP did not settle in {PATIENCE} iterations")

    @staticmethod
    def _latent(rows: Tensor, q: Gaussian) -> tuple[Tensor, Tensor]:
        """Mean and variance of f under q, (N,) each."""
        return rows @ q.mean, (rows @ q.tril).square().sum(1)


def _expect(function: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    """E[function(f)], f ~ N(mean, variance), (N,) each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    at = mean[:, None] + variance.clamp_min(1e-300).sqrt()[:, None] * torch.from_numpy(nodes)
    return function(at) @ torch.from_numpy(weights / weights.sum())


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of two probabilities of class 1, in nats: (N,), (N,) -> (N,)."""
    p, q = (torch.stack([each, 1 - each]) for each in (reference, other))
    return (p * (p.log() - q.log())).sum(0)


def rkl_exact(gp: SparseGP, x: Tensor, y: Tensor) -> Gaussian:
    """RKL at lambda = 0 in closed form: 1 / p(D_e | u) is a sum of 2^N exponentials, so q_full over it is as many
    Gaussians, of which this is the one with their moments. x (N, D), y (N,); raises InvalidData for N > 22.
    """
    if len(x) > 22:
        raise InvalidData(f"2^{len(x)} terms are too many: RKL in closed form takes 22 points at most")
    q, chunk = gp.q, 1 << 16
    rows = -(2 * y - 1)[:, None] * gp.project(x)  # 1 + exp(-y f) = 1 + exp(row u)
    bits = torch.arange(len(x))

    def terms(start: int) -> tuple[Tensor, Tensor]:
        """The logarithm of their weight and the shift of their mean."""
        numbers = torch.arange(start, min(start + chunk, 1 << len(x)))
        tilt = ((numbers[:, None] >> bits) & 1).double() @ rows
        shift = tilt @ q.covariance
        return tilt @ q.mean + (tilt * shift).sum(1) / 2, shift

    starts = range(0, 1 << len(x), chunk)
    total = torch.stack([terms(start)[0].logsumexp(0) for start in starts]).logsumexp(0)
    first, second = torch.zeros_like(q.mean), torch.zeros_like(q.tril)
    for start in starts:
        logarithm, shift = terms(start)
        weight = (logarithm - total).exp()
        first += weight @ shift
        second += (shift * weight[:, None]).T @ shift
    return Gaussian.of(q.mean + first, q.covariance + second - first.outer(first))
