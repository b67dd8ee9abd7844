"""How good a recipe is for one erasure, measured without any real data: the number that the search maximises.

A recipe makes a D' and relearns on it. It is judged on data that it has not seen: target samples that were held out,
fold by fold, and a reference D' from a generator with its own seed and a fixed recipe, on which no recipe under search
has an influence. A generator that collapses to a few images gains nothing: its classifier loses the reference.

forgetting   held-out target samples and D_e-like samples of the reference that have left the target classes; of a
             subset, those that got the most likely class of the root without the erased classes
retention    other samples of the reference that keep the parent's class, mean over classes
stability    the same of these samples turned and shifted at random, parent and child on the same views
coverage     samples of the rarest class in the recipe's D' over the mean, 1 from `ENOUGH` on
passed       share of the folds whose classifier the gate would accept by the recipe's own D' and probes (held-out
             samples count in forgetting). It shows a filter that selects too much, which the reference does not show

The score is the harmonic mean of forgetting and (3 retention + stability) / 4, times the root of coverage, times
passed. It is 0 where D' starves a class or the filter selects nothing: the pipeline would make no version of either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fsu_ray.gate import refuse_result
from fsu_ray.method import invert
from fsu_ray.method.augment import draw_moves, moved, seeded
from fsu_ray.method.evaluate import measure
from fsu_ray.method.fit import predict
from fsu_ray.method.inputs import RunInputs, TargetSamples, load_inputs
from fsu_ray.method.masking import ForgetSet, MaskedDataset
from fsu_ray.method.relearn import relearn, training_set
from fsu_ray.method.synthesize import Synthetic, starved_classes, synthesize
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator
from fsu_ray.recipes import FilterRecipe, Recipe
from fsu_ray.records import Behaviour, Digest
from fsu_ray.work import BlobStore, WorkOrder

ENOUGH = 0.1
"""More coverage than this counts no more. A thin class shows on the reference; this is for classes that are all but
missing. (With 0.5, recipes of one validation classifier were ranked worse: Spearman .89 instead of .96.)"""

FEWEST, MOST_FOLDS = 12, 3
"""Folds are made until `FEWEST` target samples have been held out, at most `MOST_FOLDS`."""

APART = 7_919
"""Added to seeds: the reference shares no draw with a recipe under search."""

NO_DIGEST = Digest("")
"""The digest of a D' or a mask that is not stored."""


@dataclass(frozen=True)
class Parts:
    """The worth of a recipe; all numbers in [0, 1]. `samples` and `probes` are the two halves of forgetting. `reason`
    says why the score is 0."""

    score: float
    forgetting: float = 0.0
    samples: float = 0.0
    probes: float = 0.0
    retention: float = 0.0
    stability: float = 0.0
    coverage: float = 0.0
    passed: float = 0.0
    reason: str = ""


def combine(forgetting: float, retention: float, stability: float, coverage: float) -> float:
    """The score of these parts (see the module's docstring), without `passed`."""
    kept = (3 * retention + stability) / 4
    both = forgetting + kept
    return 2 * forgetting * kept / both * math.sqrt(min(1.0, coverage / ENOUGH)) if both > 0 else 0.0


def reference(order: WorkOrder, store: BlobStore, device: torch.device, recipe: Recipe) -> Synthetic:
    """A D' of the order's root by a generator of `recipe`, with seeds that no recipe under search has."""
    apart = recipe.model_copy(
        update={
            "invert": recipe.invert.model_copy(update={"seed": recipe.invert.seed + APART}),
            "synthesize": recipe.synthesize.model_copy(update={"seed": recipe.synthesize.seed + APART}),
        }
    )
    teacher = load_inputs(replace(order, recipe=apart), store, device).teacher
    generator = invert.invert(teacher, apart.invert, invert.begin(teacher, apart.invert))
    return synthesize(teacher, generator, apart.synthesize)[0]


class Objective:
    """Scores recipes for the first target of `order` on the `reference` (see the function of that name).

    Needs two target samples.
    """

    def __init__(self, order: WorkOrder, store: BlobStore, device: torch.device, reference: Synthetic) -> None:
        self._order, self._store, self._device = order, store, device
        inputs = self._inputs(order.recipe)
        self.teacher = inputs.teacher
        self._target, self._samples = inputs.targets[0].target, inputs.targets[0].pixels
        masked = self._masked(inputs, reference)
        mask = masked.select(FilterRecipe(), self._behaviour, self._samples)
        self._probes = reference.pixels[mask.is_forget]
        erased = inputs.erased_classes_after
        self._expected = _without_erased(reference.logits[mask.is_forget], erased, self._behaviour.targets)
        self._rest = reference.pixels[~mask.is_forget & masked.retained()]
        self._views = moved(self._rest.float() / 255, draw_moves(len(self._rest), seeded(APART)), order.spec.flip)
        self._views = (self._views * 255).round().byte()
        self._parent = [predict(inputs.current, pixels).argmax(1) for pixels in (self._rest, self._views)]

    @property
    def _behaviour(self) -> Behaviour:
        return self._target.behaviour

    def score(self, recipe: Recipe, generator: Generator) -> Parts:
        """The worth of `recipe` with `generator`, from which D' is drawn."""
        return self.judge(recipe, synthesize(self.teacher, generator, recipe.synthesize)[0])

    def judge(self, recipe: Recipe, dataset: Synthetic) -> Parts:
        """The worth of `recipe` with D' `dataset`, which is filtered and relearned once for each fold."""
        inputs = self._inputs(recipe)
        classes, erased = inputs.order.spec.classes, inputs.erased_classes
        count = torch.bincount(dataset.predicted, minlength=classes).tolist()
        counts = [count[k] for k in range(classes) if k not in erased]
        starved = [k for k in starved_classes(count, recipe.synthesize) if k not in erased]
        if starved:
            return Parts(0.0, reason=f"starved classes {starved}")
        coverage = min(counts) / (sum(counts) / len(counts))
        masked = self._masked(inputs, dataset)
        folds: list[tuple[float, ...]] = []
        for held_out in self._folds(recipe):
            target = TargetSamples(self._target, self._samples, held_out)
            fold = replace(inputs, targets=(target,))
            forget_set = ForgetSet(target, masked.select(recipe.filter, self._behaviour, target.train), NO_DIGEST)
            if not bool(forget_set.mask.is_forget.any()):
                return Parts(0.0, coverage=coverage, reason="nothing found")
            child = relearn(fold.current, *training_set(fold, masked, [forget_set]), recipe.relearn)
            folds.append((*self._measure(fold, child, held_out), self._passes(fold, masked, forget_set, child)))
        samples, probes, retention, stability, passed = (
            sum(column) / len(folds) for column in zip(*folds, strict=True)
        )
        forgetting = (samples + probes) / 2
        score = passed * combine(forgetting, retention, stability, coverage)
        return Parts(score, forgetting, samples, probes, retention, stability, coverage, passed)

    def _inputs(self, recipe: Recipe) -> RunInputs:
        return load_inputs(replace(self._order, recipe=recipe), self._store, self._device)

    def _masked(self, inputs: RunInputs, dataset: Synthetic) -> MaskedDataset:
        return MaskedDataset(self._store, inputs.teacher, inputs.masked_erasures, dataset, NO_DIGEST)

    def _folds(self, recipe: Recipe) -> list[Tensor]:
        """The samples that each fold holds out (M,) bool: the share that a run holds out, others in each fold."""
        m = len(self._samples)
        order = torch.randperm(m, generator=seeded(recipe.relearn.seed, APART))
        size = max(1, round(recipe.gate.holdout_samples * m))
        folds = min(MOST_FOLDS, m // size, -(-FEWEST // size))
        none = torch.zeros(m, dtype=torch.bool)
        return [none.index_fill(0, part, True) for part in torch.split(order, size)[:folds]]

    def _passes(self, inputs: RunInputs, masked: MaskedDataset, forget_set: ForgetSet, child: Classifier) -> bool:
        """Whether the gate would accept a relearned classifier, whatever it makes of the held-out samples."""
        (report,) = measure(inputs, masked, [forget_set], child)
        report["forgetting"]["samples_in_target"] = None
        return refuse_result(report, inputs.recipe.gate) is None

    def _measure(self, inputs: RunInputs, child: Classifier, held_out: Tensor) -> tuple[float, float, float, float]:
        """Forgetting of samples and of probes, retention and stability of a relearned classifier."""
        behaviour, unseen = self._behaviour, self._samples[held_out]
        erased, classes = inputs.erased_classes_after, inputs.order.spec.classes
        expected = _without_erased(predict(inputs.teacher, unseen), erased, behaviour.targets)
        forgotten = []
        for pixels, classes_beneath in ((unseen, expected), (self._probes, self._expected)):
            if len(pixels):
                answer = predict(child, pixels).argmax(1)
                left = ~torch.isin(answer, torch.tensor(behaviour.targets))
                right = left if behaviour.kind == "class" else answer == classes_beneath
                forgotten.append(float(right.float().mean()))
        kept = [
            _agreement(predict(child, pixels).argmax(1), before, classes)
            for pixels, before in zip((self._rest, self._views), self._parent, strict=True)
        ]
        return forgotten[0], forgotten[-1], kept[0], kept[1]


def _without_erased(logits: Tensor, erased_classes: Sequence[int], targets: Sequence[int]) -> Tensor:
    """The most likely class (N,) by logits (N, K) without the erased and the target classes."""
    excluded = torch.zeros(logits.shape[1], dtype=torch.bool)
    excluded[[*erased_classes, *targets]] = True
    return logits.masked_fill(excluded, -torch.inf).argmax(1)


def _agreement(after: Tensor, before: Tensor, classes: int) -> float:
    """Share of the samples that keep their class (N,), mean over the classes that occur in `before`."""
    same = (after == before).float()
    shares = [same[before == k].mean() for k in range(classes) if bool((before == k).any())]
    return float(torch.stack(shares).mean()) if shares else 0.0
