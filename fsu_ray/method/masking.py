"""The masks of one run over one D': that of its own behaviour and those of every earlier erasure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fsu_ray.method.context import TargetSamples, load_samples
from fsu_ray.method.filter import Mask, allowed_classes, extract_features, select
from fsu_ray.method.fit import predict
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.models.networks import Classifier
from fsu_ray.recipes import FilterRecipe
from fsu_ray.records import Behaviour
from fsu_ray.work import BlobStore, EarlierErasure

FEWEST_PROBES = 100  # of a subset: with fewer D_e-like samples none is held out


class Line(Protocol):
    """What masks depend on: the classifier that labels D', the erasures in force, and what a run erases now."""

    @property
    def store(self) -> BlobStore: ...
    @property
    def teacher(self) -> Classifier: ...
    @property
    def earlier_erasures(self) -> tuple[EarlierErasure, ...]: ...
    @property
    def given(self) -> Sequence[TargetSamples]: ...
    @property
    def classes(self) -> int: ...


@dataclass(frozen=True)
class StaticMaskInputs:
    """A line that no run is under way on: the store, its root, the erasures in force, and how many classes it has."""

    store: BlobStore
    teacher: Classifier
    earlier_erasures: tuple[EarlierErasure, ...]
    classes: int

    @property
    def given(self) -> Sequence[TargetSamples]:
        """Nothing is erased now."""
        return ()


class MaskedDataset:
    """`dataset` (D', N samples), known to the store as `digest`, under the masks of a run."""

    def __init__(self, context: Line, dataset: Synthetic, digest: str) -> None:
        self.context, self.dataset, self.digest = context, dataset, digest

    @cached_property
    def features(self) -> Tensor:
        """(N, F): f_e of D' by the version that labelled it."""
        return extract_features(self.context.teacher, self.dataset.pixels)

    def select(self, recipe: FilterRecipe, behaviour: Behaviour, examples: Tensor) -> Mask:
        """The mask of `behaviour`, given by `examples` (M, C, H, W)."""
        teacher = self.context.teacher
        logits = (self.dataset.logits, predict(teacher, examples))
        known = extract_features(teacher, examples)
        return select(recipe, behaviour, self.features, self.dataset.predicted, known, logits)

    @cached_property
    def earlier(self) -> list[Mask]:
        """The masks of the earlier erasures, in their order."""
        return [self._prior(prior) for prior in self.context.earlier_erasures]

    def _prior(self, prior: EarlierErasure) -> Mask:
        """The recorded mask where it was made for this D', else one rebuilt from the target samples, or from
        the probes once those have been purged; where the root has lost the behaviour itself, nothing is like it."""
        store = self.context.store
        if prior.sealed:
            nothing = torch.zeros(len(self.dataset), dtype=torch.bool)
            behaviour = prior.behaviour
            return Mask(nothing, behaviour.targets, behaviour.kind == "class", prior.filter.policy, None)
        if prior.dataset == self.digest:
            return Mask.from_bytes(store.get(prior.mask))
        kept = prior.samples if store.has(prior.samples) else prior.probes
        return self.select(prior.filter, prior.behaviour, load_samples(store.get(kept)))

    def _subsets(self, own: Sequence[Mask]) -> list[Mask]:
        context = self.context
        behaviours = [
            *(prior.behaviour for prior in context.earlier_erasures),
            *(each.behaviour for each in context.given),
        ]
        masks = zip(behaviours, (*self.earlier, *own), strict=True)
        return [mask for behaviour, mask in masks if behaviour.kind == "subset"]

    def subset_forget(self, own: Sequence[Mask]) -> Tensor:
        """(N,) bool: the D_e-like samples of the subsets among the earlier behaviours and this run's, whose masks are
        `own`."""
        found = torch.zeros(len(self.dataset), dtype=torch.bool)
        for mask in self._subsets(own):
            found |= mask.is_forget
        return found

    def held_out(self, own: Sequence[Mask]) -> Tensor:
        """(N,) bool: the samples that are never trained on. A subset with too few D_e-like ones spares none of them."""
        found = self.dataset.holdout.clone()
        for mask in self._subsets(own):
            if int(mask.is_forget.sum()) < FEWEST_PROBES:
                found &= ~mask.is_forget
        return found

    def allowed(self, own: Sequence[Mask] = ()) -> Tensor:
        """(N, K) bool: the classes left to each sample under the earlier masks and `own`."""
        return allowed_classes([*self.earlier, *own], len(self.dataset), self.context.classes)
