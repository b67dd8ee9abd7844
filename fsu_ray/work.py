"""What goes to a run of the method and what comes back: digests and figures, small enough to pickle to any worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fsu_ray.recipes import FilterRecipe, Recipe
from fsu_ray.records import Behaviour, GeneratorUse, ModelSpec


class BlobStore(Protocol):
    """Content-addressed bytes. Pickles to Ray workers, which see this protocol and nothing of the storage behind it."""

    def put(self, data: bytes) -> str:
        """Write `data` once and return its SHA-256 in hex."""

    def get(self, digest: str) -> bytes:
        """The bytes of `digest`, verified; raises StorageError where they are missing or damaged."""

    def has(self, digest: str) -> bool:
        """Whether `digest` is there."""


@dataclass(frozen=True)
class EarlierErasure:
    """An earlier erasure as a worker needs it: its mask is rebuilt on a new D', its probes are re-measured.

    `sealed`: the root of this run has erased it itself, so D' needs no mask of it any more.
    """

    request: str
    behaviour: Behaviour
    filter: FilterRecipe
    samples: str
    mask: str
    probes: str
    dataset: str
    recorded: float
    sealed: bool = False


@dataclass(frozen=True)
class ErasureTarget:
    """A behaviour that a coalesced run erases besides that of its leading request."""

    request: str
    behaviour: Behaviour
    samples: str


@dataclass(frozen=True)
class GeneratorRef:
    """A generator that the registry offers to a run: its own id and artifacts, and the figures of its D'."""

    id: str
    weights: str
    dataset: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class WorkOrder:
    """Everything that one run of the method needs; digests instead of objects, so it is small and picklable.

    `reuse` is the generator to try; `warm` the one whose weights start a new training if `reuse` is
    missing or refused. `transfer` is one whose weights serve with a D' of this run's own. `bound`: the request asks for
    that generator, so that none is trained where the gate refuses it.
    """

    request: str
    spec: ModelSpec
    root_weights: str
    current_weights: str
    behaviour: Behaviour
    samples: str
    recipe: Recipe
    earlier_erasures: tuple[EarlierErasure, ...] = ()
    reuse: GeneratorRef | None = None
    warm: GeneratorRef | None = None
    test_set: str | None = None
    also: tuple[ErasureTarget, ...] = ()
    transfer: GeneratorRef | None = None
    required: bool = False

    @property
    def asked(self) -> tuple[ErasureTarget, ...]:
        """Everything that this run is to erase: its own request first."""
        return (ErasureTarget(self.request, self.behaviour, self.samples), *self.also)


@dataclass(frozen=True)
class Part:
    """What a coalesced run brought back for one request of `WorkOrder.also`."""

    request: str
    mask: str
    probes: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a run of the method brought back. `reason` is set where it ended without a result to judge.

    `report` holds the measures (see `method.evaluate`), `seconds` the time of each stage, `resumed` where
    the run went on from a checkpoint, such as `invert 200`.
    """

    reason: str | None
    generator_use: GeneratorUse
    generator_weights: str
    dataset: str
    metrics: Mapping[str, Any]
    refused: tuple[str, ...]
    weights: str | None
    mask: str | None
    probes: str | None
    report: Mapping[str, Any]
    seconds: Mapping[str, float]
    resumed: tuple[str, ...] = ()
    also: tuple[Part, ...] = ()
