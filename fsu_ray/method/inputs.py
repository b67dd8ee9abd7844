"""What the stages of one run work on: the work order, its classifiers, and the target samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fsu_ray.method.augment import seeded
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour
from fsu_ray.work import BlobStore, EarlierErasure, ErasureTarget, WorkOrder

FEWEST_TO_HOLD_OUT = 10
"""With fewer target samples none is held out."""


def save_samples(pixels: Tensor) -> bytes:
    """Target samples (M, C, H, W) uint8 as an artifact."""
    return save_tensors({"pixels": pixels.contiguous()})


def load_samples(data: bytes) -> Tensor:
    """The pixels (M, C, H, W) uint8 that `save_samples` wrote."""
    return load_tensors(data)["pixels"]


@dataclass(frozen=True)
class TargetSamples:
    """A target of a run with the pixels (M, C, H, W) uint8 of its samples. The run trains on none of the samples in
    `held_out` (M,) bool; it only measures them."""

    target: ErasureTarget
    pixels: Tensor
    held_out: Tensor

    @property
    def behaviour(self) -> Behaviour:
        """What is to be erased."""
        return self.target.behaviour

    @property
    def train(self) -> Tensor:
        """The samples that the run may train on, (M', C, H, W)."""
        return self.pixels[~self.held_out]


@dataclass(frozen=True)
class RunInputs:
    """A work order with its artifacts loaded. Stages read it and change nothing in it.

    `current` is the classifier to relearn. `teacher` labels D': the root, or the current version in the paper's form.
    `masked_erasures` are the earlier erasures whose masks lie on D', none in the paper's form.
    """

    order: WorkOrder
    store: BlobStore
    device: torch.device
    current: Classifier
    teacher: Classifier
    targets: tuple[TargetSamples, ...]
    masked_erasures: tuple[EarlierErasure, ...]

    @property
    def recipe(self) -> Recipe:
        """The numbers that decide the result."""
        return self.order.recipe

    @property
    def erased_classes(self) -> list[int]:
        """The classes that earlier requests erased as a whole."""
        return whole_classes(self.order.earlier_erasures)

    @property
    def erased_classes_after(self) -> list[int]:
        """The classes that are erased as a whole once this run has succeeded."""
        return sorted({*self.erased_classes, *whole_classes(self.order.targets)})


def load_inputs(order: WorkOrder, store: BlobStore, device: torch.device) -> RunInputs:
    """Read the artifacts that `order` names; raises StorageError where one is missing."""

    def classifier(digest: str) -> Classifier:
        return load_classifier(order, store, device, digest)

    paper = order.recipe.form == "paper"
    current = classifier(order.current_weights)
    return RunInputs(
        order=order,
        store=store,
        device=device,
        current=current,
        teacher=current if paper else classifier(order.root_weights),
        targets=tuple(_target_samples(order.recipe, target, store) for target in order.targets),
        masked_erasures=() if paper else order.earlier_erasures,
    )


def load_classifier(order: WorkOrder, store: BlobStore, device: torch.device, digest: str) -> Classifier:
    """The classifier with the weights `digest`, in eval mode, on `device`."""
    classifier = Classifier.from_bytes(order.spec, store.get(digest))
    return classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _target_samples(recipe: Recipe, target: ErasureTarget, store: BlobStore) -> TargetSamples:
    pixels = load_samples(store.get(target.samples))
    m = len(pixels)
    held_out = torch.zeros(m, dtype=torch.bool)
    if m >= FEWEST_TO_HOLD_OUT:
        number = max(1, round(recipe.gate.holdout_samples * m))
        held_out[torch.randperm(m, generator=seeded(recipe.relearn.seed, m))[:number]] = True
    return TargetSamples(target, pixels, held_out)


def whole_classes(erasures: Sequence[EarlierErasure | ErasureTarget]) -> list[int]:
    """The classes that `erasures` erase as a whole, sorted."""
    behaviours = [erasure.behaviour for erasure in erasures]
    return sorted({target for behaviour in behaviours if behaviour.kind == "class" for target in behaviour.targets})
