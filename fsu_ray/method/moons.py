"""Few-shot unlearning of the sparse GP (section 4.1): the method's steps for a classifier of points in the plane.

The paper does not say how Ours is done here; this is the form that was measured to come to its figures. The inversion
has the entropy and the diversity loss (eq. 3 and 5); there are no BatchNorm layers, no augmentation and no neighbouring
pixels, so eq. 4, 6 and 7 do not exist. f_e is the GP's own feature map, the distance of eq. 9 its own kernel, t_f is
Otsu's threshold, and what is D_e-like is dropped: with two classes, a label whose target has no mass left (eq. 10)
would say that the other one is right, while the model that never saw D_e is unsure there.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fsu_ray.errors import RunFailed
from fsu_ray.method.baselines.sparse_gp import SparseGP
from fsu_ray.method.filter import knee, pairwise
from fsu_ray.method.invert import diversity_loss, entropy_loss
from fsu_ray.method.synthesize import entropy
from fsu_ray.recipes import Frozen

LATENT, HIDDEN = 2, 64


class MoonsRecipe(Frozen):
    """Every number that decides a result. `mode`: what becomes of D_e-like points: `drop`, `unsure` (the target's logit
    is 0: a label of one half each), `renormalise` (no mass on the target: the other class)."""

    steps: int = Field(1000, ge=1)
    batch: int = Field(128, ge=4)
    lr: float = Field(2e-3, gt=0)
    diversity: float = Field(1.0, ge=0, description="weight of eq. 5; eq. 3 has 1")
    per_class: int = Field(500, ge=2)
    entropy_threshold: float = Field(0.5, gt=0, description="t_ent in nats")
    policy: Literal["otsu", "knee", "none"] = Field("otsu", description="t_f; none: nothing is D_e-like")
    mode: Literal["drop", "unsure", "renormalise"] = "drop"
    seed: int = 0


class PointGenerator(nn.Module):
    """z (N, 2), y (N,) -> points (N, 2), in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(LATENT + 2, HIDDEN), nn.LeakyReLU(0.2),
                nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 2),
            ).double()  # fmt: skip

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        points: Tensor = self.layers(torch.cat([z, F.one_hot(y, 2).to(z.dtype)], 1))
        return points


def _logits(gp: SparseGP, x: Tensor) -> Tensor:
    """(N, 2), such that their softmax is p."""
    p = gp.probability(x)
    return torch.stack([1 - p, p], 1).clamp_min(1e-12).log()


def invert(gp: SparseGP, recipe: MoonsRecipe) -> PointGenerator:
    """Train a generator for `gp` (Algorithm 1), half of each batch for each class."""
    generator, rng = PointGenerator(recipe.seed), torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.Adam(generator.parameters(), lr=recipe.lr, betas=(0.5, 0.999))
    each = recipe.batch // 2
    labels = torch.arange(2).repeat_interleave(each)
    for _ in range(recipe.steps):
        z = torch.randn((2 * each, LATENT), generator=rng, dtype=torch.float64)
        x = generator(z, labels)
        features = gp.features(x) / gp.scale**0.5
        loss = entropy_loss(_logits(gp, x), labels) + recipe.diversity * diversity_loss(z, features, 2)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return generator.eval()


@torch.no_grad()
def synthesize(gp: SparseGP, generator: PointGenerator, recipe: MoonsRecipe) -> tuple[Tensor, Tensor]:
    """D' (eq. 8): points (2 * per_class, 2) of low entropy that `gp` gives the class they were drawn for, and that
    class (N,), 0 or 1. Raises RunFailed where a class starves."""
    rng = torch.Generator().manual_seed(recipe.seed + 1)
    points, labels = [], []
    for label in range(2):
        passed: list[Tensor] = []
        for _ in range(40):
            z = torch.randn((recipe.per_class, LATENT), generator=rng, dtype=torch.float64)
            x = generator(z, torch.full((recipe.per_class,), label))
            logits = _logits(gp, x)
            passed.append(x[(entropy(logits) < recipe.entropy_threshold) & (logits.argmax(1) == label)])
            if sum(map(len, passed)) >= recipe.per_class:
                break
        else:
            raise RunFailed(f"class {label} starves: too few of its points have an entropy below t_ent")
        points.append(torch.cat(passed)[: recipe.per_class])
        labels.append(torch.full((recipe.per_class,), float(label), dtype=torch.float64))
    return torch.cat(points), torch.cat(labels)


def distances(gp: SparseGP, x: Tensor, examples: Tensor) -> Tensor:
    """1 - mean_e k(x, x_e) / s, with the GP's kernel: x (N, D), examples (M, D) -> (N,). Eq. 9, the sign put right."""
    scaled = [points * gp.precisions.sqrt() for points in (x, examples)]
    return pairwise(scaled[0], scaled[1], "rbf", 1.0).mean(1)


def otsu(distances: Tensor, bins: int = 256) -> float:
    """The threshold that splits distances (N,) into two groups with the least variance within (Otsu 1979)."""
    low, high = float(distances.min()), float(distances.max())
    counts = torch.histc(distances, bins, low, high).double()
    centres = low + (torch.arange(bins) + 0.5) * (high - low) / bins
    below, mass = counts.cumsum(0), (counts * centres).cumsum(0)
    above = below[-1] - below
    between = below * above * (mass / below.clamp_min(1) - (mass[-1] - mass) / above.clamp_min(1)).square()
    best = int(between[:-1].argmax())
    return low + (best + 1) * (high - low) / bins


def resembling(gp: SparseGP, x: Tensor, y: Tensor, examples: Tensor, example_labels: Tensor, policy: str) -> Tensor:
    """(N,) bool: the D_e-like points of D', all of the class that most of the examples have."""
    is_forget = torch.zeros(len(x), dtype=torch.bool)
    if policy == "none":
        return is_forget
    target = float(example_labels.mean() >= 0.5)
    candidates = (y == target).nonzero().flatten()
    far = distances(gp, x[candidates], examples)
    is_forget[candidates[far <= (otsu(far) if policy == "otsu" else knee(far.sort().values) or 0.0)]] = True
    return is_forget


def relearn(gp: SparseGP, x: Tensor, y: Tensor, is_forget: Tensor, mode: str, number: int) -> SparseGP:
    """From `gp` on D_unlearn under the prior: D' weighs as `number` points, what is dropped takes its weight away."""
    weight = torch.full_like(y, number / len(y))
    if mode == "drop":
        return gp.fitted(x[~is_forget], y[~is_forget], weight[~is_forget])
    labels = torch.where(is_forget, 0.5 if mode == "unsure" else 1 - y, y)
    return gp.fitted(x, labels, weight)


def unlearn(
    gp: SparseGP, generator: PointGenerator, examples: Tensor, labels: Tensor, recipe: MoonsRecipe, number: int
) -> SparseGP:
    """`gp`, which learned `number` points, without what `examples` (M, 2) with `labels` (M,) stand for."""
    x, y = synthesize(gp, generator, recipe)
    return relearn(gp, x, y, resembling(gp, x, y, examples, labels, recipe.policy), recipe.mode, number)
