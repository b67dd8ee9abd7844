"""Relearning: the classifier goes on from its weights, on D_unlearn (eq. 10, Algorithm 4)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from fsu_ray.method.filter import relabel
from fsu_ray.method.fit import TrainingSchedule, fit, predict
from fsu_ray.method.group import Group
from fsu_ray.method.inputs import RunInputs, load_samples
from fsu_ray.method.masking import ForgetSet, MaskedDataset
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import RelearnRecipe
from fsu_ray.work import StepCallback


def training_set(
    inputs: RunInputs, masked: MaskedDataset, forget_sets: Sequence[ForgetSet]
) -> tuple[Tensor, Tensor, Tensor]:
    """D_unlearn: pixels (N, C, H, W) uint8, soft labels (N, K), and (N,) bool: the samples of D'.

    The other samples are target samples, each `repeats` times. The D_e-like samples of a subset, which are few, come
    in `repeats` times more too. The samples of earlier subsets are included until they are purged, so that those
    subsets do not come back.
    """
    dataset, recipe, store = masked.dataset, inputs.recipe.relearn, inputs.store
    allowed = masked.allowed(forget_sets)
    usable = ~masked.held_out(forget_sets) & allowed.any(1)
    again = (masked.subset_forget(forget_sets) & usable).nonzero()
    train = torch.cat([usable.nonzero(), *[again] * recipe.repeats]).flatten()
    pixels, labels = [dataset.pixels[train]], [relabel(dataset.logits[train], allowed[train])]
    examples = [(target.train, target.behaviour) for target in inputs.targets]
    for erasure in inputs.masked_erasures:
        if erasure.behaviour.kind == "subset" and store.has(erasure.samples):
            examples.append((load_samples(store.get(erasure.samples)), erasure.behaviour))
    for samples, behaviour in examples:
        left = torch.ones((len(samples), dataset.logits.shape[1]), dtype=torch.bool)
        left[:, [*behaviour.targets, *inputs.erased_classes_after]] = False
        if bool(left.any()):
            pixels += [samples] * recipe.repeats
            labels += [relabel(predict(inputs.teacher, samples), left)] * recipe.repeats
    all_pixels = torch.cat(pixels)
    return all_pixels, torch.cat(labels), torch.arange(len(all_pixels)) < len(train)


def relearn(
    classifier: Classifier,
    pixels: Tensor,
    targets: Tensor,
    synthetic: Tensor,
    recipe: RelearnRecipe,
    on_epoch: StepCallback | None = None,
    group: Group | None = None,
) -> Classifier:
    """A copy of `classifier` that was trained on D_unlearn. BatchNorm keeps its statistics, which describe the real
    data.

    pixels (N, C, H, W) uint8 and soft labels targets (N, K), as `training_set` gives them. synthetic (N,) bool tells
    the samples of D': they are not augmented where `recipe.augment` is `samples`. The ranks of `group` share every
    batch, must be given the same data, and end with the same weights.
    """
    child = copy.deepcopy(classifier)
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
    plain = synthetic if recipe.augment == "samples" else None
    fit(child, pixels, targets, schedule, flip=child.spec.flip, on_epoch=on_epoch, as_they_are=plain, group=group)
    return child
