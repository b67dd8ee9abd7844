"""Few-shot unlearning of the moons' sparse GP: the steps, and that they come near the oracle where it counts."""

from __future__ import annotations

import pytest
import torch

from fsu_ray.errors import RunFailed
from fsu_ray.experiments.moons import Setting, setting, subset
from fsu_ray.method import moons
from fsu_ray.method.baselines.sparse_gp import SparseGP, divergence


@pytest.fixture(scope="module")
def told() -> Setting:
    return setting()


@pytest.fixture(scope="module")
def made(told: Setting) -> tuple[moons.PointGenerator, torch.Tensor, torch.Tensor]:
    """A generator of 300 steps and its D'."""
    recipe = moons.MoonsRecipe(steps=300)
    generator = moons.invert(told.original, recipe)
    return generator, *moons.synthesize(told.original, generator, recipe)


def away(told: Setting, gp: SparseGP) -> float:
    """KL(oracle || gp), mean over D_e."""
    x = told.x[told.erased]
    return float(divergence(told.oracle.probability(x), gp.probability(x)).mean())


def test_points_are_sure_and_of_the_class_that_they_were_asked_for(told: Setting, made: object) -> None:
    """Eq. 8, half for each class, of some variety."""
    _, x, y = made
    p = told.original.probability(x)
    h = -(p * p.log() + (1 - p) * (1 - p).log())
    assert (len(x), float(y.sum())) == (1000, 500)
    assert float(h.max()) < 0.5
    assert torch.equal((p > 0.5).double(), y)
    assert float(x[y == 1].std(0).min()) > 0.15


def test_five_points_are_enough_to_come_near_the_oracle(told: Setting, made: object) -> None:
    """Near it: a tenth of how far the original is, and a fifth of what relearning without a filter leaves."""
    _, x, y = made
    left = []
    for policy in ("none", "otsu"):
        chosen = subset(0.25, 0)
        is_forget = moons.resembling(told.original, x, y, told.x[chosen], told.y[chosen], policy)
        left.append(away(told, moons.relearn(told.original, x, y, is_forget, "drop", 100)))
    assert left[1] < 0.043
    assert left[1] < left[0] / 5
    wrong = told.x[:80][told.y[:80] == 1][:5]  # the other end of the same moon
    is_forget = moons.resembling(told.original, x, y, wrong, torch.ones(5), "otsu")
    assert away(told, moons.relearn(told.original, x, y, is_forget, "drop", 100)) > 5 * left[1]


def test_only_points_of_the_examples_class_are_like_them(told: Setting, made: object) -> None:
    """One of the five has the other label, which changes nothing."""
    _, x, y = made
    chosen = subset(0.25, 0)
    labels = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    is_forget = moons.resembling(told.original, x, y, told.x[chosen], labels, "otsu")
    assert bool(is_forget.any())
    assert bool(y[is_forget].all())


def test_what_becomes_of_the_points_that_are_like_them(told: Setting) -> None:
    """Dropped, they count for nothing; unsure, for one half each; renormalised, for the other class. D' as a whole
    weighs as many points as were learned."""
    gp, x, y = told.original, told.x, told.y
    is_forget = torch.zeros(100, dtype=torch.bool)
    is_forget[told.erased] = True
    assert away(told, moons.relearn(gp, x, y, is_forget, "drop", 100)) < 1e-9, "with D itself it is the oracle"
    twice = moons.relearn(gp, x.repeat(2, 1), y.repeat(2), is_forget.repeat(2), "drop", 100)
    assert away(told, twice) < 1e-9, "as many again weigh half each"
    p = {mode: float(moons.relearn(gp, x, y, is_forget, mode, 100).probability(x[is_forget]).mean())
         for mode in ("drop", "unsure", "renormalise")}  # fmt: skip
    assert p["renormalise"] < 0.2 < p["unsure"] < p["drop"]


def test_distances_are_those_of_the_kernel(told: Setting) -> None:
    """1 - k / s, averaged over the examples."""
    x, examples = told.x[:7], told.x[90:93]
    wanted = 1 - (told.original.kernel(x, examples) / told.original.scale).mean(1)
    torch.testing.assert_close(moons.distances(told.original, x, examples), wanted)


def test_otsu_parts_two_groups_wherever_they_lie() -> None:
    """Of very different sizes too; against the least variance within by trying every cut."""
    rng = torch.Generator().manual_seed(0)
    for subset_forget, many in ((50, 50), (20, 400), (400, 20)):
        low = 0.2 + 0.05 * torch.randn(subset_forget, generator=rng, dtype=torch.float64)
        high = 0.8 + 0.05 * torch.randn(many, generator=rng, dtype=torch.float64)
        found = torch.cat([low, high])
        ordered = found.sort().values
        within = [
            float(ordered[:i].var(correction=0) * i + ordered[i:].var(correction=0) * (len(ordered) - i))
            for i in range(1, len(ordered))
        ]
        best = int(torch.tensor(within).argmin())
        threshold = moons.otsu(found)
        assert ordered[best] - 0.01 <= threshold <= ordered[best + 1] + 0.01


def test_a_class_without_points_is_said_to_starve(told: Setting) -> None:
    """A threshold that nothing passes ends in one line."""
    recipe = moons.MoonsRecipe(steps=1, entropy_threshold=1e-6, per_class=10)
    with pytest.raises(RunFailed, match="class 0 starves"):
        moons.synthesize(told.original, moons.invert(told.original, recipe), recipe)
