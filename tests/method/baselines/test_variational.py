"""EUBO and RKL where the answer is known: a linear Gaussian model, whose p(u | D_r) is a Gaussian in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from fsu_ray.errors import InvalidConfig
from fsu_ray.method.baselines.variational import Descent, Diagonal, Gaussian, effective_draws, eubo, eubo_sampled, rkl

NOISE = 2.0


@dataclass
class Linear:
    """y = x^T u + N(0, NOISE^2), u ~ N(0, I) of dimension 3, ten points; the last three are to be erased."""

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn((10, 3), generator=rng, dtype=torch.float64)
        self.y = self.x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + torch.randn(
            10, generator=rng, dtype=torch.float64
        )
        self.full, self.rest = self.posterior(10), self.posterior(7)
        self.gone_x, self.gone_y = self.x[7:], self.y[7:]

    def posterior(self, number: int) -> Gaussian:
        x, y = self.x[:number], self.y[:number]
        covariance = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + x.T @ x / NOISE**2)
        return Gaussian.of(covariance @ x.T @ y / NOISE**2, covariance)

    def log_likelihood(self, u: Tensor) -> Tensor:
        return -(self.gone_y - u @ self.gone_x.T).square().sum(1) / (2 * NOISE**2)

    def expected(self, q: Gaussian) -> Tensor:
        spread = (self.gone_x @ q.tril).square().sum()
        return self.log_likelihood(q.mean[None])[0] - spread / (2 * NOISE**2)


@pytest.fixture
def linear() -> Linear:
    return Linear()


def test_the_distance_of_gaussians_is_that_of_torch(linear: Linear) -> None:
    """Against torch.distributions, both ways; and the precision is the covariance's inverse."""
    a, b = (
        torch.distributions.MultivariateNormal(each.mean, scale_tril=each.tril) for each in (linear.full, linear.rest)
    )
    assert float(linear.full.kl(linear.rest)) == pytest.approx(float(torch.distributions.kl_divergence(a, b)))
    assert float(linear.rest.kl(linear.full)) == pytest.approx(float(torch.distributions.kl_divergence(b, a)))
    torch.testing.assert_close(linear.full.precision @ linear.full.covariance, torch.eye(3, dtype=torch.float64))


def test_without_a_cut_all_of_them_find_what_is_left(linear: Linear) -> None:
    """p(u | D_r) is a Gaussian here, so that every KL is least at it. Moving to it means something: .2 nats."""
    assert float(linear.rest.kl(linear.full)) > 0.15
    assert float(eubo(linear.full, linear.expected).kl(linear.rest)) < 1e-9
    still = Descent(1, 2, 1e-9)
    assert float(eubo_sampled(linear.full, linear.log_likelihood, 0, 0, still, linear.rest).kl(linear.rest)) < 1e-9
    sampled = eubo_sampled(linear.full, linear.log_likelihood, 0, 0, Descent(steps=400, samples=100, lr=0.03))
    assert float(sampled.kl(linear.rest)) < 2e-3
    assert float(rkl(linear.full, linear.log_likelihood, 0, 0, batches=30, size=10_000).kl(linear.rest)) < 2e-3


def test_a_diagonal_one_finds_what_is_left_too() -> None:
    """Where p(u | D_r) has no correlations: ten observations, each of one dimension; from q_full and from elsewhere."""
    x = torch.eye(3, dtype=torch.float64)[torch.arange(10) % 3]
    y = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def posterior(number: int) -> Diagonal:
        variance = 1 / (1 + x[:number].square().sum(0) / NOISE**2)
        return Diagonal(variance * (x[:number].T @ y[:number]) / NOISE**2, variance.sqrt())

    def log_likelihood(u: Tensor) -> Tensor:
        return -(y[7:] - u @ x[7:].T).square().sum(1) / (2 * NOISE**2)

    full, rest = posterior(10), posterior(7)
    a, b = (torch.distributions.Normal(each.mean, each.scale) for each in (full, rest))
    assert float(full.kl(rest)) == pytest.approx(float(torch.distributions.kl_divergence(a, b).sum()))
    assert float(rest.kl(full)) > 0.04
    how = Descent(steps=400, samples=100, lr=0.03)
    begin = Diagonal(torch.full_like(full.mean, 1.0), full.scale / 2)
    for start in (None, begin):
        assert float(eubo_sampled(full, log_likelihood, 0, 0, how, start).kl(rest)) < 1e-3
    assert float(eubo_sampled(full, log_likelihood, 0, 0, Descent(1, 2, 1e-9), begin).kl(begin)) < 1e-9
    assert float(rkl(full, log_likelihood, 0, 0, batches=30, size=10_000).kl(rest)) < 1e-3
    with pytest.raises(InvalidConfig, match="do not vary"):
        rkl(full, log_likelihood, 0, 0, batches=1, size=1)


def test_what_draws_are_worth(linear: Linear) -> None:
    """All of them where nothing is known of D_e; one where D_e decides; else those within the cut."""
    full = Diagonal(linear.full.mean, torch.ones_like(linear.full.mean))
    assert effective_draws(full, lambda u: torch.zeros(len(u)), 0, 0) == pytest.approx(1000)
    assert effective_draws(full, lambda u: 1e6 * u[:, 0], 0, 0) == pytest.approx(1)
    half = effective_draws(full, lambda u: torch.zeros(len(u)), math.exp(-2.366 / 2), 0)  # the median of chi^2 of 3
    assert half == pytest.approx(500, abs=25)
    assert effective_draws(full, lambda u: torch.zeros(len(u)), Decimal("1e-2410"), 0) == pytest.approx(1000)


def test_a_cut_keeps_them_near_what_was_learned(linear: Linear) -> None:
    """EUBO with almost all of the density cut off erases nothing; with a lower lambda it erases more."""
    how = Descent(steps=150, samples=100)
    moved = [float(eubo_sampled(linear.full, linear.log_likelihood, cut, 0, how).kl(linear.full))
             for cut in (0.999, 0.3, 1e-6)]  # fmt: skip
    assert moved[0] < 1e-3 < moved[1] < moved[2]


def test_rkl_has_the_moments_of_what_is_left_inside_the_cut() -> None:
    """In one dimension, against numerical integration over the interval where q_full is above lambda of its peak."""
    full = Gaussian(torch.tensor([1.0], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64))

    def log_likelihood(u: Tensor) -> Tensor:
        return -u.square().sum(1) / 2 + u.sum(1)

    reach = math.sqrt(2 * -math.log(0.2)) * 0.5
    u = torch.linspace(1 - reach, 1 + reach, 200_001, dtype=torch.float64)
    weight = (-((u - 1) / 0.5).square() / 2 - log_likelihood(u[:, None])).softmax(0)
    mean = float(weight @ u)
    spread = float((weight @ (u - mean).square()).sqrt())
    found = rkl(full, log_likelihood, 0.2, 0, batches=300)
    assert float(found.mean) == pytest.approx(mean, abs=3e-3)
    assert float(found.tril) == pytest.approx(spread, abs=3e-3)


def test_the_same_seed_finds_the_same(linear: Linear) -> None:
    """And another seed another."""
    how = Descent(steps=50, samples=50)
    one, two, other = (
        eubo_sampled(linear.full, linear.log_likelihood, 0.1, seed, how).mean.tolist() for seed in (3, 3, 4)
    )
    assert one == two != other
    one, two, other = (
        rkl(linear.full, linear.log_likelihood, 0.1, seed, batches=3).mean.tolist() for seed in (3, 3, 4)
    )
    assert one == two != other


def test_what_makes_no_sense_is_refused(linear: Linear) -> None:
    """A lambda that is none, one that leaves no draw, a covariance that is none, data that were never learned."""
    for cut in (-0.1, 1.0):
        with pytest.raises(InvalidConfig, match="share of the greatest density"):
            rkl(linear.full, linear.log_likelihood, cut, 0)
    with pytest.raises(InvalidConfig, match="cuts all draws away"):
        rkl(linear.full, linear.log_likelihood, 1 - 1e-9, 0, batches=2, size=10)
    with pytest.raises(InvalidConfig, match="not positive definite"):
        Gaussian.of(torch.zeros(2), -torch.eye(2))
    with pytest.raises(InvalidConfig, match="no minimum"):
        eubo(linear.full, lambda q: 100 * linear.expected(q))
