"""Relearning: the classifier goes on from where it is, on D_unlearn (eq. 10, Algorithm 4)."""

from __future__ import annotations

from torch import Tensor

from fsu_ray.method.fit import EpochCallback, TrainingSchedule, fit
from fsu_ray.method.group import Group
from fsu_ray.models.networks import Classifier
from fsu_ray.recipes import RelearnRecipe


def relearn(
    classifier: Classifier,
    pixels: Tensor,
    targets: Tensor,
    synthetic: Tensor,
    recipe: RelearnRecipe,
    progress: EpochCallback | None = None,
    group: Group | None = None,
) -> None:
    """Train `classifier` in place on D_unlearn; BatchNorm keeps its statistics, which describe the real data.

    pixels (N, C, H, W) uint8 with soft labels targets (N, K): D' under all masks and the given samples, relabelled.
    synthetic (N,) bool tells which is which: where `recipe.augment` is `samples`, those of D' are not augmented.
    Every batch is shared by the ranks of `group`, which give the same data and end with the same weights.
    """
    still = synthetic if recipe.augment == "samples" else None
    schedule = TrainingSchedule(
        epochs=recipe.epochs,
        batch=recipe.batch,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        one_cycle=False,
        frozen_statistics=True,
        precision=recipe.precision,
        seed=recipe.seed,
    )
    flip = classifier.spec.flip
    fit(classifier, pixels, targets, schedule, flip=flip, progress=progress, as_they_are=still, group=group)
