"""The vocabulary of fsu_ray: frozen records that every layer passes on and none changes.

This module knows nothing of torch, Ray or SQL. What people write (here and in `recipes`) is a pydantic
model; everything that the ledger hands out is a plain frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from fsu_ray.recipes import FilterRecipe, Frozen, Recipe

Kind = Literal["class", "subset"]
GeneratorUse = Literal["trained", "reused", "warm_started"]


class Status(StrEnum):
    """The states of a request; `TRANSITIONS` says which may follow which."""

    SUBMITTED = "submitted"
    AWAITING_APPROVAL = "awaiting_approval"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether a request in this state never changes again."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.SUBMITTED: frozenset({Status.AWAITING_APPROVAL, Status.QUEUED, Status.CANCELLED}),
    Status.AWAITING_APPROVAL: frozenset({Status.QUEUED, Status.REJECTED, Status.CANCELLED}),
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED}),
    Status.RUNNING: frozenset(
        # RUNNING -> RUNNING is a take-over: the lease has expired and the next attempt begins.
        {Status.RUNNING, Status.QUEUED, Status.SUCCEEDED, Status.REJECTED, Status.FAILED, Status.CANCELLED}
    ),
    Status.SUCCEEDED: frozenset(),
    Status.REJECTED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


class ModelSpec(Frozen):
    """What is needed to build a model line's network and feed it: everything but the weights.

    `mean` and `std` normalise pixels in [0, 1], one value a channel. `flip` says whether the
    classifier was trained with horizontal flips, which the augmentations of eq. 4 and 8 then include.
    """

    arch: str
    channels: int = Field(ge=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    classes: int = Field(ge=2)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flip: bool = False

    @model_validator(mode="after")
    def _fits(self) -> ModelSpec:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} needs 1 or {self.channels} values, got {len(values)}")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if self.height % 4 or self.width % 4:
            raise ValueError(f"height and width must be multiples of 4, got {self.height}x{self.width}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)


class Behaviour(Frozen):
    """What is to be erased. `class`: the target classes as a whole; `subset`: some samples wrongly given them."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$")
    kind: Kind
    targets: tuple[int, ...] = Field(min_length=1)

    @field_validator("targets")
    @classmethod
    def _sorted(cls, targets: tuple[int, ...]) -> tuple[int, ...]:
        if min(targets) < 0:
            raise ValueError("target classes are numbered from 0")
        return tuple(sorted(set(targets)))


@dataclass(frozen=True)
class Model:
    """A named line of versions."""

    id: str
    name: str
    spec: ModelSpec
    test_set: str | None
    created_at: datetime


@dataclass(frozen=True)
class ModelVersion:
    """Immutable weights with one parent. `root` is the number of the version whose labels D' carries."""

    id: str
    model: str
    number: int
    parent: int | None
    root: int
    weights: str
    request: str | None
    created_at: datetime


@dataclass(frozen=True)
class Request:
    """A request to erase a behaviour; the only record whose row changes."""

    id: str
    model: str
    behaviour: Behaviour
    samples: str
    sample_count: int
    recipe: Recipe
    status: Status
    attempt: int
    worker: str | None
    lease_until: datetime | None
    reason: str | None
    version: int | None
    report: Mapping[str, Any] | None
    submitted_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True)
class Generator:
    """A trained inverter G and the D' drawn from it, with the figures that the gate judges them by."""

    id: str
    model: str
    root: int
    spec: ModelSpec
    recipe_digest: str
    weights: str
    dataset: str
    origin: GeneratorUse
    warm_started_from: str | None
    figures: Mapping[str, Any]
    request: str
    created_at: datetime


@dataclass(frozen=True)
class Erasure:
    """Insert-only: this behaviour is gone as of this version. `mask` and `probes` are artifacts."""

    id: str
    model: str
    version: int
    request: str
    behaviour: Behaviour
    samples: str
    mask: str
    probes: str
    generator: str
    generator_use: GeneratorUse
    report: Mapping[str, Any]
    created_at: datetime


class BlobStore(Protocol):
    """Content-addressed bytes. Pickles to Ray workers, which see this protocol and nothing of the storage behind it."""

    def put(self, data: bytes) -> str:
        """Write `data` once and return its SHA-256 in hex."""

    def get(self, digest: str) -> bytes:
        """The bytes of `digest`, verified; raises StorageError where they are missing or damaged."""

    def has(self, digest: str) -> bool:
        """Whether `digest` is there."""


@dataclass(frozen=True)
class PriorErasure:
    """An earlier erasure as a worker needs it: its mask is rebuilt on a new D', its probes are re-measured."""

    request: str
    behaviour: Behaviour
    filter: FilterRecipe
    samples: str
    mask: str
    probes: str
    dataset: str
    recorded: float


@dataclass(frozen=True)
class GeneratorRef:
    """A generator that the registry offers to a run: its own id and artifacts, and the figures of its D'."""

    id: str
    weights: str
    dataset: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class WorkOrder:
    """Everything that one run of the method needs; digests instead of objects, so it is small and picklable.

    `reuse` is the generator to try; `warm` the one whose weights start a new training if `reuse` is
    missing or refused.
    """

    request: str
    spec: ModelSpec
    root_weights: str
    current_weights: str
    behaviour: Behaviour
    samples: str
    recipe: Recipe
    priors: tuple[PriorErasure, ...] = ()
    reuse: GeneratorRef | None = None
    warm: GeneratorRef | None = None
    test_set: str | None = None


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
    figures: Mapping[str, Any]
    refused: tuple[str, ...]
    weights: str | None
    mask: str | None
    probes: str | None
    report: Mapping[str, Any]
    seconds: Mapping[str, float]
    resumed: tuple[str, ...] = ()
