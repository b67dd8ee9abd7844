"""Masks over one D': the masks of the earlier erasures, and those of the targets of a run (eq. 9 and 10)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fsu_ray.method.filter import Mask, allowed_classes, extract_features, policy_of, select, select_class
from fsu_ray.method.fit import predict
from fsu_ray.method.inputs import RunInputs, TargetSamples, load_samples
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import FilterRecipe
from fsu_ray.records import Behaviour, Digest
from fsu_ray.work import BlobStore, EarlierErasure

FEWEST_PROBES = 100
"""A subset with fewer D_e-like samples in D' has none of them held out."""


@dataclass(frozen=True)
class ForgetSet:
    """A target of a run and its mask over D', with the digest of the mask."""

    target: TargetSamples
    mask: Mask
    digest: Digest


def select_masks(inputs: RunInputs, masked: MaskedDataset) -> tuple[Digest, ...]:
    """Select the mask of each target of a run and store it: the digests, in the order of the targets."""
    recipe = inputs.recipe.filter
    masks = (masked.select(recipe, target.behaviour, target.train) for target in inputs.targets)
    return tuple(inputs.store.put(mask.to_bytes()) for mask in masks)


def load_forget_sets(inputs: RunInputs, masks: Sequence[Digest]) -> tuple[ForgetSet, ...]:
    """The forget sets whose masks `select_masks` stored."""
    pairs = zip(inputs.targets, masks, strict=True)
    return tuple(ForgetSet(target, Mask.from_bytes(inputs.store.get(mask)), mask) for target, mask in pairs)


class MaskedDataset:
    """`dataset` (D', N samples), stored as `digest` and labelled by `teacher`, under the masks of earlier erasures.

    Features and masks are computed when they are first asked for.
    """

    def __init__(
        self,
        store: BlobStore,
        teacher: Classifier,
        earlier_erasures: Sequence[EarlierErasure],
        dataset: Synthetic,
        digest: str,
    ) -> None:
        self.dataset, self.digest = dataset, digest
        self._store, self._teacher, self._earlier_erasures = store, teacher, tuple(earlier_erasures)

    @cached_property
    def features(self) -> Tensor:
        """(N, F): f_e of D' by the classifier that labelled it."""
        return extract_features(self._teacher, self.dataset.pixels)

    @cached_property
    def earlier(self) -> list[Mask]:
        """The masks of the earlier erasures, in their order."""
        return [self._earlier_mask(erasure) for erasure in self._earlier_erasures]

    def select(self, recipe: FilterRecipe, behaviour: Behaviour, examples: Tensor) -> Mask:
        """The mask of `behaviour`, given by `examples` (M, C, H, W) uint8.

        The policy `class` needs no features, and so no pass of the teacher over D'.
        """
        if policy_of(recipe, behaviour) == "class":
            return select_class(behaviour, self.dataset.predicted)
        logits = (self.dataset.logits, predict(self._teacher, examples))
        example_features = extract_features(self._teacher, examples)
        return select(recipe, behaviour, self.features, self.dataset.predicted, example_features, logits)

    def _earlier_mask(self, erasure: EarlierErasure) -> Mask:
        """The recorded mask where it was made for this D'. Otherwise the mask is selected again from the target
        samples, or from the probes once the samples are purged. A sealed erasure has no D_e-like samples here."""
        store, behaviour = self._store, erasure.behaviour
        if erasure.sealed:
            nothing = torch.zeros(len(self.dataset), dtype=torch.bool)
            return Mask(nothing, behaviour.targets, behaviour.kind == "class", erasure.filter.policy, None)
        if erasure.dataset == self.digest:
            return Mask.from_bytes(store.get(erasure.mask))
        examples = erasure.samples if store.has(erasure.samples) else erasure.probes
        return self.select(erasure.filter, behaviour, load_samples(store.get(examples)))

    def allowed(self, forget_sets: Iterable[ForgetSet] = ()) -> Tensor:
        """(N, K) bool: the classes left to each sample under the earlier masks and those of `forget_sets`."""
        return allowed_classes(self._masks(forget_sets), len(self.dataset), self.dataset.logits.shape[1])

    def retained(self, forget_sets: Iterable[ForgetSet] = ()) -> Tensor:
        """(N,) bool: the samples that are D_e-like under none of the earlier masks and those of `forget_sets`."""
        retained = torch.ones(len(self.dataset), dtype=torch.bool)
        for mask in self._masks(forget_sets):
            retained &= ~mask.is_forget
        return retained

    def subset_forget(self, forget_sets: Iterable[ForgetSet]) -> Tensor:
        """(N,) bool: the D_e-like samples of the subsets among the earlier erasures and `forget_sets`."""
        is_forget = torch.zeros(len(self.dataset), dtype=torch.bool)
        for mask in self._subset_masks(forget_sets):
            is_forget |= mask.is_forget
        return is_forget

    def held_out(self, forget_sets: Iterable[ForgetSet]) -> Tensor:
        """(N,) bool: the samples that are never trained on. Of a subset with fewer than `FEWEST_PROBES` D_e-like
        samples, all are trained on."""
        held_out = self.dataset.holdout.clone()
        for mask in self._subset_masks(forget_sets):
            if int(mask.is_forget.sum()) < FEWEST_PROBES:
                held_out &= ~mask.is_forget
        return held_out

    def _masks(self, forget_sets: Iterable[ForgetSet]) -> list[Mask]:
        return [*self.earlier, *(forget_set.mask for forget_set in forget_sets)]

    def _subset_masks(self, forget_sets: Iterable[ForgetSet]) -> list[Mask]:
        earlier = zip(self._earlier_erasures, self.earlier, strict=True)
        return [
            *(mask for erasure, mask in earlier if erasure.behaviour.kind == "subset"),
            *(each.mask for each in forget_sets if each.target.behaviour.kind == "subset"),
        ]
