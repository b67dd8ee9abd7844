"""The vocabulary of fsu_ray: frozen records that every layer passes on and none changes.

This module knows nothing of torch, Ray or SQL. Recipes are pydantic models, because people write
them; everything that the ledger hands out is a plain frozen dataclass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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


class Frozen(BaseModel):
    """A record that people write: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical(self) -> str:
        """The record as canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical()`, in hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


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


class LossWeights(Frozen):
    """Weights of the five losses of section 3.1."""

    bn: float = Field(10.0, ge=0)
    entropy: float = Field(1.0, ge=0)
    augmentation: float = Field(1.0, ge=0)
    diversity: float = Field(2.0, ge=0)
    tv: float = Field(0.1, ge=0)


class InvertRecipe(Frozen):
    """How a generator is trained (section 3.1, Algorithm 1).

    `form` is `norm` (norms, as measured in the method sheet) or `squared` (the literal squares of
    eq. 4, 6 and 7). `batch` is rounded down to whole samples a class, at least two.
    """

    steps: int = Field(400, ge=1)
    batch: int = Field(250, ge=4)
    lr: float = Field(2e-3, gt=0)
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = Field(2e-4, ge=0)
    width: int = Field(8, ge=1, description="n: the generator has 8n, 4n and 2n channels")
    latent: int = Field(100, ge=1, description="dimensions of z")
    weights: LossWeights = LossWeights()
    form: Literal["norm", "squared"] = "norm"
    views: int = Field(2, ge=0, description="augmented views a sample in eq. 4")
    precision: Literal["bf16", "float32"] = "bf16"
    seed: int = 0


class SynthesizeRecipe(Frozen):
    """How D' is drawn (eq. 8). `entropy_threshold` is t_ent in nats; `rotation` is in degrees."""

    per_class: int = Field(500, ge=2)
    entropy_threshold: float = Field(0.867, gt=0)
    rotation: float = Field(15.0, ge=0, le=180)
    max_draws: int = Field(40, ge=1, description="draws a class stop at max_draws * per_class")
    starved_below: float = Field(0.1, ge=0, le=1, description="a class with under this share of per_class is starved")
    holdout: float = Field(0.1, gt=0, lt=1, description="share of D' that is never trained on")
    seed: int = 0


class FilterRecipe(Frozen):
    """Which samples of D' are D_e-like (eq. 9). `auto` is `class` for a class and `leave-one-out` for a subset."""

    policy: Literal["auto", "knee", "leave-one-out", "class", "manual"] = "auto"
    metric: Literal["rbf", "cosine", "l2"] = "rbf"
    quantile: float = Field(1.0, gt=0, le=1, description="of the leave-one-out distances, for `leave-one-out`: t_f")
    runner_up: float = Field(0.02, ge=0, lt=1, description="least probability of the samples' own class, for a subset")
    threshold: float | None = Field(None, gt=0, description="t_f, for the policy `manual` alone")

    @model_validator(mode="after")
    def _threshold(self) -> FilterRecipe:
        if (self.policy == "manual") != (self.threshold is not None):
            raise ValueError("filter.threshold goes with filter.policy = manual, and only with it")
        return self


class RelearnRecipe(Frozen):
    """How the classifier relearns D_unlearn (eq. 10). `sample_repeats`: how often the given samples are added."""

    epochs: int = Field(5, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(1.5e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(2e-5, ge=0)
    sample_repeats: int = Field(1, ge=0)
    mask_repeats: int = Field(10, ge=0, description="how often the few D_e-like samples of a subset are added again")
    seed: int = 0


class GateRecipe(Frozen):
    """The bounds of both gates. The first five judge a result, the others whether a generator may be reused."""

    forgotten_max: float = Field(
        0.05, ge=0, le=1, description="held-out target samples and probes still in a target class"
    )
    agreement_min: float = Field(0.97, ge=0, le=1, description="same class as the parent on held-out retained D'")
    returned_max: float = Field(0.05, ge=0, le=1, description="an earlier erasure's probes in its target classes")
    returned_margin: float = Field(0.02, ge=0, le=1, description="rise of that share above its own record")
    holdout_samples: float = Field(
        0.2, gt=0, lt=1, description="share of the target samples held out, from 10 samples on"
    )
    acceptance_min: float = Field(0.01, ge=0, le=1, description="share of a class's draws that pass eq. 8")
    coverage_min: float = Field(0.3, ge=0, le=1, description="samples of the rarest class in D' over the mean")
    bn_distance_max: float = Field(1.0, ge=0, description="mean relative distance of D' from the running statistics")
    dataset_agreement_min: float = Field(0.95, ge=0, le=1, description="D' and the current version, outside all masks")


class Recipe(Frozen):
    """Every number that decides a result. `form`: `continual` (masks over one D' with root labels) or `paper`
    (D' drawn and labelled anew by the current version, one mask)."""

    form: Literal["continual", "paper"] = "continual"
    invert: InvertRecipe = InvertRecipe()
    synthesize: SynthesizeRecipe = SynthesizeRecipe()
    filter: FilterRecipe = FilterRecipe()
    relearn: RelearnRecipe = RelearnRecipe()
    gate: GateRecipe = GateRecipe()

    @property
    def generator_digest(self) -> str:
        """Digest of the parts that decide a generator and its D': two recipes that share it may share both."""
        parts = f"{self.form}:{self.invert.digest}:{self.synthesize.digest}"
        return hashlib.sha256(parts.encode()).hexdigest()


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

    `report` holds the measures (see `method.evaluate`), `seconds` the time of each stage.
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
