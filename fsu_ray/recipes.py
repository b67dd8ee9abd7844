"""Recipes: every number that decides a result, with its bounds and its default. `config` holds the presets."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Frozen(BaseModel):
    """A record that people write: its values are checked, it is immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical(self) -> str:
        """The record as JSON with sorted keys and without spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical()`, in hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def first_fault(error: ValidationError, whole: str = "value") -> str:
    """The first fault that `error` names, in one line: `field: what is wrong`.

    `whole` stands for the field where the fault is of several fields together.
    """
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or whole}: {fault['msg'].removeprefix('Value error, ')}"


class LossWeights(Frozen):
    """Weights of the five losses of section 3.1."""

    bn: float = Field(10.0, ge=0)
    entropy: float = Field(1.0, ge=0)
    augmentation: float = Field(1.0, ge=0)
    diversity: float = Field(2.0, ge=0)
    tv: float = Field(0.1, ge=0)


Form = Literal["norm", "squared", "relative"]
"""The form of the losses of eq. 4, 6 and 7; see `InvertRecipe`."""

Precision = Literal["auto", "bf16", "float32"]
"""bf16 is mixed precision: weights and sums stay float32. `auto`: bf16 where the device supports it, else float32."""


class InvertRecipe(Frozen):
    """How a generator is trained (section 3.1, Algorithm 1).

    `form` is `norm` (norms in the place of squares), `squared` (the squares of eq. 4, 6 and 7) or `relative` (norms;
    that of eq. 6 is divided by the norm of the running statistics, and averaged over layers). `batch` is rounded down
    to the same number of samples for each class, at least two.
    """

    steps: int = Field(400, ge=1)
    batch: int = Field(250, ge=4)
    lr: float = Field(2e-3, gt=0)
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = Field(2e-4, ge=0)
    width: int = Field(8, ge=1, description="n: the generator has 8n, 4n and 2n channels")
    latent: int = Field(100, ge=1, description="dimensions of z")
    weights: LossWeights = LossWeights()
    form: Form = "norm"
    views: int = Field(2, ge=0, description="augmented views a sample in eq. 4")
    precision: Precision = "auto"
    seed: int = 0

    def each(self, classes: int) -> int:
        """The number of samples of each class in a batch."""
        return max(2, self.batch // classes)


class SynthesizeRecipe(Frozen):
    """How D' is drawn (eq. 8). `entropy_threshold` is t_ent in nats; `rotation` is in degrees.

    Keep the threshold above the entropy of the samples to be erased. Samples that were labelled at random with one of
    three classes have ln 3 = 1.10 nats, so a lower threshold would keep exactly these samples out of D'.
    """

    per_class: int = Field(500, ge=2)
    entropy_threshold: float = Field(1.3, gt=0)
    rotation: float = Field(15.0, ge=0, le=180)
    max_draws: int = Field(40, ge=1, description="drawing ends after max_draws * per_class samples of a class")
    starved_below: float = Field(
        0.1, ge=0, le=1, description="a class with a smaller share of per_class than this is starved"
    )
    holdout: float = Field(0.1, gt=0, lt=1, description="share of D' that is never trained on")
    seed: int = 0


class FilterRecipe(Frozen):
    """Which samples of D' are D_e-like (eq. 9). `auto` is `class` for a class and `leave-one-out` for a subset."""

    policy: Literal["auto", "knee", "leave-one-out", "class", "manual"] = "auto"
    metric: Literal["rbf", "cosine", "l2"] = "rbf"
    quantile: float = Field(
        1.0, gt=0, le=1, description="t_f for `leave-one-out`: this quantile of the leave-one-out distances"
    )
    runner_up: float = Field(0.2, ge=0, lt=1, description="for a subset: least probability of the samples' own class")
    fewest: int = Field(
        3, ge=0, description="for a subset: the likeliest samples are taken where fewer reach runner_up"
    )
    threshold: float | None = Field(None, gt=0, description="t_f for the policy `manual`, and only for it")

    @model_validator(mode="after")
    def _threshold(self) -> FilterRecipe:
        if (self.policy == "manual") != (self.threshold is not None):
            raise ValueError("filter.threshold goes with filter.policy = manual, and only with it")
        return self


class RelearnRecipe(Frozen):
    """How the classifier relearns D_unlearn (eq. 10).

    By default only the target samples are augmented. Augmenting all of D' moves its samples further from the data that
    they stand for, and the classifier drifts with them.
    """

    epochs: int = Field(5, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(2e-5, ge=0)
    repeats: int = Field(5, ge=0, description="of the target samples, and of a subset's D_e-like samples")
    augment: Literal["samples", "all"] = Field(
        "samples", description="augment only the target samples, or all of D_unlearn"
    )
    precision: Precision = "float32"
    seed: int = 0


class GateRecipe(Frozen):
    """The bounds of both gates. The first five judge a result, the others decide whether a generator may be reused."""

    forgotten_max: float = Field(
        0.05, ge=0, le=1, description="held-out target samples and probes still in a target class"
    )
    agreement_min: float = Field(0.97, ge=0, le=1, description="same class as the parent on held-out retained D'")
    returned_max: float = Field(
        0.05, ge=0, le=1, description="an earlier erasure's probes in its targets, or their share then where larger"
    )
    returned_margin: float = Field(
        0.02, ge=0, le=1, description="rise of that share above its share when it was erased"
    )
    holdout_samples: float = Field(
        0.2, gt=0, lt=1, description="share of the target samples held out, from 10 samples on"
    )
    acceptance_min: float = Field(0.01, ge=0, le=1, description="share of a class's draws that pass eq. 8")
    coverage_min: float = Field(0.3, ge=0, le=1, description="samples of the rarest class in D' over the mean")
    bn_distance_max: float = Field(1.0, ge=0, description="mean relative distance of D' from the running statistics")
    dataset_agreement_min: float = Field(0.95, ge=0, le=1, description="D' and the current version, outside all masks")


class Recipe(Frozen):
    """Every number that decides a result.

    `form`: `continual` (masks over one D' that the root labelled) or `paper` (D' drawn and labelled anew by the current
    version, one mask).
    """

    form: Literal["continual", "paper"] = "continual"
    invert: InvertRecipe = InvertRecipe()
    synthesize: SynthesizeRecipe = SynthesizeRecipe()
    filter: FilterRecipe = FilterRecipe()
    relearn: RelearnRecipe = RelearnRecipe()
    gate: GateRecipe = GateRecipe()

    @property
    def generator_digest(self) -> str:
        """The digest of the parts that decide a generator and its D'. Recipes with the same digest may share both."""
        parts = f"{self.form}:{self.invert.digest}:{self.synthesize.digest}"
        return hashlib.sha256(parts.encode()).hexdigest()
