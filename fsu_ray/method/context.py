"""What the stages of one run share: the work order, its classifiers and samples, progress and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fsu_ray.method.augment import seeded
from fsu_ray.method.group import Group
from fsu_ray.models.networks import Classifier
from fsu_ray.records import Behaviour, GeneratorUse
from fsu_ray.work import BlobStore, EarlierErasure, ErasureTarget, WorkOrder

ProgressCallback = Callable[[str, int, int, dict[str, float]], None]
FEWEST_TO_HOLD_OUT = 10  # with fewer target samples none is held out


@dataclass
class RunState:
    """What a checkpoint holds: the stages that are done, by their results, and a running inversion."""

    use: GeneratorUse | None = None
    generator: str | None = None
    dataset: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    weights: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_at: list[str] = field(default_factory=list)
    inversion: dict[str, Any] | None = None


Checkpoint = Callable[[RunState], None]


def save_samples(pixels: Tensor) -> bytes:
    """Target samples (M, C, H, W) uint8 as an artifact."""
    return save_tensors({"pixels": pixels.contiguous()})


def load_samples(data: bytes) -> Tensor:
    """What `save_samples` wrote: (M, C, H, W) uint8."""
    return load_tensors(data)["pixels"]


@dataclass(frozen=True)
class TargetSamples:
    """A behaviour that a run is to erase, and its target samples (M, C, H, W); those in `held_out` (M,) are only
    measured on."""

    asked: ErasureTarget
    samples: Tensor
    held_out: Tensor

    @property
    def behaviour(self) -> Behaviour:
        """What is to be erased."""
        return self.asked.behaviour

    @property
    def train(self) -> Tensor:
        """The samples that the run may use."""
        return self.samples[~self.held_out]


class Context:
    """One run of `order`, which the ranks of `group` carry out in step. `current` is the classifier to relearn,
    `labeller` the one that labels D': the root, or the current version in the paper's form, which knows no earlier
    masks either."""

    def __init__(
        self,
        order: WorkOrder,
        store: BlobStore,
        device: torch.device,
        progress: ProgressCallback | None,
        checkpoint: Checkpoint | None,
        saved: RunState,
        every: int,
        group: Group,
    ) -> None:
        self.order, self.store, self.device, self.group = order, store, device, group
        self.progress, self.checkpoint, self.saved, self.every = progress, checkpoint, saved, every
        self.recipe, self.classes = order.recipe, order.spec.classes
        paper = self.recipe.form == "paper"
        self.current = self.classifier(order.current_weights)
        self.teacher = self.current if paper else self.classifier(order.root_weights)
        self.given = tuple(self._given(asked) for asked in order.targets)
        self.earlier_erasures: tuple[EarlierErasure, ...] = () if paper else order.earlier_erasures
        self.gone = classes_of(order.earlier_erasures)
        self.gone_after = sorted({*self.gone, *classes_of(order.targets)})

    def classifier(self, digest: str) -> Classifier:
        """The classifier with the weights of `digest`, on this run's device."""
        found = Classifier.from_bytes(self.order.spec, self.store.get(digest))
        return found.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def _given(self, asked: ErasureTarget) -> TargetSamples:
        samples = load_samples(self.store.get(asked.samples))
        m = len(samples)
        chosen = torch.zeros(m, dtype=torch.bool)
        if m >= FEWEST_TO_HOLD_OUT:
            number = max(1, round(self.recipe.gate.holdout_samples * m))
            chosen[torch.randperm(m, generator=seeded(self.recipe.relearn.seed, m))[:number]] = True
        return TargetSamples(asked, samples, chosen)

    def tell(self, stage: str, done: int, total: int, metrics: dict[str, float] | None = None) -> None:
        """A stage has come to `done` of `total`: for all ranks to say at once, and the first one is heard."""
        progress = self.progress
        if progress:
            self.group.once(lambda: progress(stage, done, total, metrics or {}))

    def finish(self, stage: str, started: float) -> None:
        """A stage is done: note its time and save the state."""
        self.saved.seconds[stage] = self.saved.seconds.get(stage, 0.0) + time.monotonic() - started
        self.saved.inversion = None
        if self.checkpoint:
            self.checkpoint(self.saved)


def classes_of(erased: Sequence[EarlierErasure | ErasureTarget]) -> list[int]:
    """The classes that such erasures take away as a whole."""
    behaviours = [each.behaviour for each in erased]
    return sorted({target for each in behaviours if each.kind == "class" for target in each.targets})
