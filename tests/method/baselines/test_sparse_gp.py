"""The sparse GP of the moons: its optimum by another optimiser, and the values that section 4.1's setting must give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fsu_ray.errors import InvalidData
from fsu_ray.experiments.moons import Setting, setting
from fsu_ray.method.baselines.sparse_gp import SparseGP, divergence, rkl_exact
from fsu_ray.method.baselines.variational import Gaussian, eubo, rkl


@pytest.fixture(scope="module")
def moons() -> Setting:
    return setting()


def mean_kl(reference: SparseGP, other: SparseGP, x: Tensor) -> float:
    return float(divergence(reference.probability(x), other.probability(x)).mean())


def test_original_and_oracle_differ_as_the_sheet_says(moons: Setting) -> None:
    """The exact values: over D_e .4306 one way and .2915 the other, over all 100 points .0873."""
    assert mean_kl(moons.oracle, moons.original, moons.x[moons.erased]) == pytest.approx(0.4306, abs=1e-3)
    assert mean_kl(moons.original, moons.oracle, moons.x[moons.erased]) == pytest.approx(0.2915, abs=1e-3)
    assert mean_kl(moons.oracle, moons.original, moons.x) == pytest.approx(0.0873, abs=1e-3)
    assert float(moons.oracle.probability(moons.x[moons.erased]).mean()) == pytest.approx(0.590, abs=1e-3)


def test_all_of_d_e_given_both_bounds_erase_too_much(moons: Setting) -> None:
    """EUBO and RKL at lambda = 0 come to 3.503 from the oracle, each by its own closed form."""
    x, y = moons.x[moons.erased], moons.y[moons.erased]
    full = moons.original
    q = eubo(full.q, lambda q: full.expected_log_likelihood(x, y, q))
    assert mean_kl(moons.oracle, replace(full, posterior=q), x) == pytest.approx(3.503, abs=2e-3)
    q = rkl_exact(full, x, y)
    assert mean_kl(moons.oracle, replace(full, posterior=q), x) == pytest.approx(3.502, abs=2e-3)


def test_the_closed_form_of_rkl_is_what_draws_come_to(moons: Setting) -> None:
    """Five points, 300,000 draws."""
    x, y = moons.x[moons.erased][:5], moons.y[moons.erased][:5]
    full = moons.original
    drawn = rkl(full.q, lambda u: full.log_likelihood(x, y, u), 0, 0, batches=150)
    exact = rkl_exact(full, x, y)
    assert float(exact.kl(full.q)) > 0.01
    assert float(drawn.kl(exact)) < 2e-3


def test_the_fit_is_the_optimum_of_the_bound(moons: Setting) -> None:
    """By L-BFGS on the same bound, from elsewhere; and a fit that begins at another posterior ends in the same."""
    gp = SparseGP(moons.original.inducing[:5], moons.original.scale, moons.original.precisions)
    x, y = moons.x, moons.y
    weight = torch.tensor([0.2, 0.7, 1.0, 1.5], dtype=torch.float64).repeat_interleave(25)
    mean = torch.full((5,), 0.3, dtype=torch.float64, requires_grad=True)
    lower = torch.eye(5, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS([mean, lower], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def posterior() -> Gaussian:
        tril = lower.tril(-1) + torch.diag(lower.diagonal().abs())
        return Gaussian(gp.prior.tril @ mean, gp.prior.tril @ tril)

    def loss() -> Tensor:
        optimiser.zero_grad()
        q = posterior()
        parts = (gp.expected_log_likelihood(x[i : i + 25], y[i : i + 25], q) * weight[i] for i in range(0, 100, 25))
        log_likelihood = sum(parts)
        value = q.kl(gp.prior) - log_likelihood
        value.backward()
        return value

    optimiser.step(loss)
    other = posterior()
    other = Gaussian(other.mean.detach(), other.tril.detach())
    found = gp.fitted(x, y, weight)
    assert float(found.q.kl(other)) < 1e-6
    assert (
        float(replace(gp, posterior=Gaussian(gp.prior.mean + 1, gp.prior.tril / 3)).fitted(x, y, weight).q.kl(found.q))
        < 1e-9
    )


def test_probabilities_are_those_of_the_posteriors_draws(moons: Setting) -> None:
    """Quadrature against 200,000 draws, and log p(y | x, u) against the logistic function."""
    gp, x = moons.original, moons.x[::10]
    u = (
        gp.q.mean
        + torch.randn((200_000, 20), generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ gp.q.tril.T
    )
    drawn = torch.sigmoid(u @ gp.project(x).T)
    torch.testing.assert_close(gp.probability(x), drawn.mean(0), atol=3e-3, rtol=0)
    y = moons.y[::10]
    right = torch.where(y.bool(), drawn[0], 1 - drawn[0]).log().sum()
    assert float(gp.log_likelihood(x, y, u[:1])) == pytest.approx(float(right))


def test_what_does_not_fit_is_refused(moons: Setting) -> None:
    """Points of another dimension, labels of another number, more points than a closed form takes."""
    gp = moons.original
    with pytest.raises(InvalidData, match="points"):
        gp.fitted(moons.x[:, :1], moons.y)
    with pytest.raises(InvalidData, match="points"):
        gp.fitted(moons.x, moons.y[:5])
    with pytest.raises(InvalidData, match="22 points"):
        rkl_exact(gp, moons.x[:23], moons.y[:23])
