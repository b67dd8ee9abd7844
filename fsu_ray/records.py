"""The records of fsu_ray, all frozen. This module knows nothing of torch, Ray or SQL.

Records that people write (here and in `recipes`) are pydantic models, which check their values. Records that the
ledger returns are plain dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, NewType

from pydantic import AwareDatetime, Field, field_validator, model_validator

from fsu_ray.recipes import Frozen, Recipe

Digest = NewType("Digest", str)
"""The SHA-256 of an artifact's bytes or of a recipe, as 64 hexadecimal digits."""

ProgressCallback = Callable[[str, int, int, dict[str, float]], None]
"""Called with a stage, how many of its steps are done, how many there are, and metrics by name."""

Kind = Literal["class", "subset"]
GeneratorUse = Literal["trained", "reused", "warm_started", "transferred"]
GeneratorOrigin = Literal["trained", "warm_started", "transferred", "imported"]


class Status(StrEnum):
    """The states of a request; `TRANSITIONS` says which state may follow which."""

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
        """Whether a request in this state has ended: it never changes again."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.SUBMITTED: frozenset({Status.AWAITING_APPROVAL, Status.QUEUED, Status.CANCELLED}),
    Status.AWAITING_APPROVAL: frozenset({Status.QUEUED, Status.REJECTED, Status.CANCELLED}),
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED}),
    Status.RUNNING: frozenset(
        # RUNNING -> RUNNING is a take-over: the lease has expired and the next attempt begins.
        {Status.RUNNING, Status.QUEUED, Status.SUCCEEDED, Status.REJECTED, Status.FAILED, Status.CANCELLED}
    ),
    **dict.fromkeys((Status.SUCCEEDED, Status.REJECTED, Status.FAILED, Status.CANCELLED), frozenset[Status]()),
}


class ModelSpec(Frozen):
    """The network of a model without its weights: the architecture, its input and its number of classes.

    `mean` and `std` normalise pixels in [0, 1]: one value, or one for each channel. `flip`: the classifier was trained
    with horizontal flips, so the augmentations of eq. 4 and 8 include them.
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
    """What is to be erased. `class`: the whole target classes. `subset`: some samples that are wrongly given them."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$")
    kind: Kind
    targets: tuple[int, ...] = Field(min_length=1)

    @field_validator("targets")
    @classmethod
    def _sorted(cls, targets: tuple[int, ...]) -> tuple[int, ...]:
        if min(targets) < 0:
            raise ValueError("target classes are numbered from 0")
        return tuple(sorted(set(targets)))


ACTOR = r"^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,99}$"
"""An opaque id of a person or a process. Not an e-mail address or a full name: the ledger holds no personal data."""

OPERATOR = "operator"
"""The actor of an action for which nobody is named."""


class Terms(Frozen):
    """How a request is to be treated.

    `key`: repeated submissions with this key return the same request; without it, one is derived from the behaviour and
    the samples. `not_before`, `due_at`: the earliest start and the deadline. `generator`: the id of the only generator
    that may serve the request; it may be another model's.
    """

    key: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$")
    priority: int = Field(0, ge=-1000, le=1000, description="higher is earlier")
    not_before: AwareDatetime | None = None
    due_at: AwareDatetime | None = None
    requested_by: str | None = Field(None, pattern=ACTOR)
    generator: str | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Terms:
        if self.not_before and self.due_at and self.due_at <= self.not_before:
            raise ValueError("due_at must be later than not_before")
        return self


class Policy(Frozen):
    """The policy of a model: approval of requests, and retention. The ledger keeps every earlier policy."""

    approval: bool = Field(False, description="requests wait for the approval of another person than the requester")
    samples_days: float | None = Field(
        None, ge=0, le=36500, description="target samples are purged so many days after the end of their request"
    )
    generators: Literal["keep", "retire-after-erasure", "max-age"] = "keep"
    generator_days: float | None = Field(None, gt=0, le=36500, description="the age for generators = max-age")
    seal: Literal["dataset", "root"] = Field("dataset", description="what a seal deletes: D' and G, or the root too")

    @model_validator(mode="after")
    def _age(self) -> Policy:
        if (self.generators == "max-age") != (self.generator_days is not None):
            raise ValueError("generator_days goes with generators = max-age, and only with it")
        return self


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
    weights: Digest
    request: str | None
    created_at: datetime


@dataclass(frozen=True)
class Request:
    """A request to erase a behaviour. It is the only record that changes: `changes` counts how often it has.

    `samples` is the digest of the target samples. `batch_leader` is the request in whose run this one is carried out.
    `failures` counts attempts that broke; `retry_at` is when the next may begin. `cancel_by` is who wants it cancelled.
    """

    id: str
    model: str
    behaviour: Behaviour
    samples: Digest
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
    key: str
    priority: int
    not_before: datetime | None
    due_at: datetime | None
    requested_by: str | None
    generator: str | None
    batch_leader: str | None
    no_coalesce: bool
    failures: int
    retry_at: datetime | None
    cancel_by: str | None
    changes: int

    def overdue(self, moment: datetime) -> bool:
        """Whether its deadline was before `moment`, and before its end."""
        return self.due_at is not None and self.due_at < (self.finished_at or moment)


@dataclass(frozen=True)
class RequestEvent:
    """A step of a request from the state `old` to `new`; the first step has no `old`."""

    request: str
    number: int
    attempt: int
    old: Status | None
    new: Status
    at: datetime
    actor: str
    reason: str | None


@dataclass(frozen=True)
class Generator:
    """A generator G and the D' drawn from it, with the metrics that the gate judges them by.

    `weights` and `dataset` are the digests of G and of D'. `request` is None where it was imported. A transferred
    generator has the weights of `transferred_from` and a D' with labels of its own model. `retired`: why it is no
    longer offered. `sealed`: the version as of which its D' was rewritten; `dataset` is then the new D'. `taints`: the
    number of erasures since its training, all of which it can still draw.
    """

    id: str
    model: str
    root: int
    spec: ModelSpec
    recipe_digest: Digest
    weights: Digest
    dataset: Digest
    origin: GeneratorOrigin
    warm_started_from: str | None
    transferred_from: str | None
    metrics: Mapping[str, Any]
    request: str | None
    created_at: datetime
    retired: str | None = None
    sealed: int | None = None
    taints: int = 0


@dataclass(frozen=True)
class Erasure:
    """The record that a behaviour is erased as of a version. `samples`, `mask` and `probes` are digests."""

    id: str
    model: str
    version: int
    request: str
    behaviour: Behaviour
    samples: Digest
    mask: Digest
    probes: Digest
    generator: str
    generator_use: GeneratorUse
    report: Mapping[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class SearchedRecipe:
    """A recipe that a search found for the requests of one kind of a model, with its score and its measurements.

    A record without a recipe and a score is a reset: requests take a preset again.
    """

    id: str
    model: str
    kind: Kind
    recipe: Recipe | None
    score: float | None
    evidence: Mapping[str, Any]
    created_at: datetime
    actor: str


@dataclass(frozen=True)
class Recheck:
    """The probes of an erasure, measured again on a version.

    `probes` is their number, `share` the share of them in a target class (None where there are none).
    """

    erasure: str
    version: int
    probes: int
    share: float | None
    passed: bool
    actor: str
    created_at: datetime


@dataclass(frozen=True)
class AliasMove:
    """A move of an alias to `version`. `previous` is the version it pointed to before."""

    model: str
    alias: str
    version: int
    previous: int | None
    forced: bool
    reason: str | None
    actor: str
    created_at: datetime


@dataclass(frozen=True)
class Schedule:
    """When the requests of a model are carried out: from each time of `cron` in `timezone` on, for `minutes`.

    None for `max_requests` or `minutes`: there is no such bound.
    """

    id: str
    model: str
    cron: str
    timezone: str
    max_requests: int | None
    minutes: int | None
    state: Literal["active", "paused", "removed"]
    actor: str
    created_at: datetime
    changed_at: datetime


@dataclass(frozen=True)
class Window:
    """One firing of a schedule. `missed` counts the earlier times of the schedule that this window stands for too."""

    schedule: str
    starts_at: datetime
    missed: int
    fired_at: datetime
    worker: str
    lease_until: datetime | None
    finished_at: datetime | None
    requests: int


@dataclass(frozen=True)
class QueueStats:
    """Counts of requests by (model, state), of requests that could begin now by model (`depth`), and of erasures by
    (model, use of their generator)."""

    requests: Mapping[tuple[str, str], int]
    depth: Mapping[str, int]
    uses: Mapping[tuple[str, str], int]

    @property
    def reuse_ratio(self) -> float | None:
        """The share of all erasures that reused a generator; None where there are no erasures."""
        total = sum(self.uses.values())
        reused = sum(number for (_, use), number in self.uses.items() if use == "reused")
        return reused / total if total else None
