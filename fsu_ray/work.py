"""What goes to a run of the method and what comes back: digests and metrics, small enough to pickle to any worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fsu_ray.recipes import FilterRecipe, Recipe
from fsu_ray.records import Behaviour, Digest, GeneratorUse, ModelSpec


class BlobStore(Protocol):
    """Content-addressed bytes. Pickles to Ray workers, which see this protocol and nothing of the storage behind it."""

    def put(self, data: bytes) -> Digest:
        """Write `data` once and return its digest."""

    def get(self, digest: str) -> bytes:
        """The bytes of `digest`, verified; raises StorageError where they are missing or damaged."""

    def has(self, digest: str) -> bool:
        """Whether `digest` is there."""


StepCallback = Callable[[int, int, dict[str, float]], None]
"""Hears of the progress within one stage: (done, total, metrics), such as epoch, epochs and losses."""


@dataclass(frozen=True)
class EarlierErasure:
    """An earlier erasure as a run needs it: its mask is rebuilt on a new D', its probes are measured again.

    `filter` is the part of its recipe that selected its mask. `samples`, `mask`, `probes` and `dataset` (the D' that
    the mask was made for) are digests. `recorded` is the share of its probes in a target class when it was erased.
    `sealed`: the root of this run has erased it itself, so D' needs no mask of it any more.
    """

    request: str
    behaviour: Behaviour
    filter: FilterRecipe
    samples: Digest
    mask: Digest
    probes: Digest
    dataset: Digest
    recorded: float
    sealed: bool = False


@dataclass(frozen=True)
class ErasureTarget:
    """A behaviour that a run erases: the request that asked for it, and the digest of its target samples."""

    request: str
    behaviour: Behaviour
    samples: Digest


@dataclass(frozen=True)
class GeneratorRef:
    """A generator of the ledger that a run may use: its id, its artifacts and the metrics of its D'."""

    id: str
    weights: Digest
    dataset: Digest
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class GeneratorCandidates:
    """The generators that a run may use.

    `reuse`: with its D' as it is, if the gate accepts them. `warm`: its weights start a new training if `reuse` is
    missing or refused. `transfer`: with its weights, from which this run draws a D' of its own. `required`: the request
    names this generator, so no other is trained where the gate refuses it.
    """

    reuse: GeneratorRef | None = None
    warm: GeneratorRef | None = None
    transfer: GeneratorRef | None = None
    required: bool = False

    @property
    def warm_start(self) -> GeneratorRef | None:
        """The generator whose weights a new training starts from."""
        return self.warm or self.reuse


@dataclass(frozen=True)
class WorkOrder:
    """Everything that one run of the method needs. It holds digests instead of data, so it is small and picklable.

    `root_weights` label D', `current_weights` are relearned. `targets` are erased together, the target of the leading
    request first. `test_set` names labelled data to report accuracies on; None for none.
    """

    spec: ModelSpec
    root_weights: Digest
    current_weights: Digest
    targets: tuple[ErasureTarget, ...]
    recipe: Recipe
    earlier_erasures: tuple[EarlierErasure, ...] = ()
    generators: GeneratorCandidates = GeneratorCandidates()
    test_set: str | None = None


@dataclass(frozen=True)
class TargetResult:
    """What a run brought back for one of its targets.

    `mask` and `probes` are digests, None where the run ended before its filter. `report` holds the measures (see
    `method.evaluate`), empty where the run ended before its evaluation.
    """

    request: str
    mask: Digest | None = None
    probes: Digest | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a run of the method brought back. `reason` is set where the run ended without a result to judge.

    `metrics` are those of D' (see `method.evaluate.generator_metrics`), `refused` the gate's reasons against the
    generator on offer. `weights` are the relearned ones. `targets` are in the order of `WorkOrder.targets`. `seconds`
    is the time of each stage. `resumed` lists where the run went on from a checkpoint, such as `invert 200`.
    """

    reason: str | None
    generator_use: GeneratorUse
    generator_weights: Digest
    dataset: Digest
    metrics: Mapping[str, Any]
    refused: tuple[str, ...]
    weights: Digest | None
    targets: tuple[TargetResult, ...]
    seconds: Mapping[str, float]
    resumed: tuple[str, ...] = ()
