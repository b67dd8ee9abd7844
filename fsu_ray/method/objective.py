"""How good a recipe is for one erasure, measured without any real data: what the search maximises.

A recipe makes a D' and relearns on it. It is judged on what it has not seen: target samples that were held out, fold
by fold, and a reference D' from a generator of its own seed and fixed recipe, which no recipe under search has a say
in. So a generator that collapses to a few images gains nothing by it: its classifier loses the reference.

forgetting   held-out target samples and the reference's D_e-like samples that have left the target classes; of a
             subset, that have gone to the class that the root sees beneath them
retention    reference samples of the rest that keep the parent's class, mean over classes
stability    the same of reference samples turned and shifted at random, parent and child on the same views
coverage     samples of the rarest class in the recipe's D' over the mean, 1 from `ENOUGH` on
passed       share of the folds whose classifier the gate would let pass by the recipe's own D' and probes (held-out
             samples count in forgetting): a filter that takes in too much shows there, not on the reference

The score is the harmonic mean of forgetting and kept = (3 retention + stability) / 4, times the root of coverage, times
passed; 0 where D' starves a class or nothing is found: of all that, the pipeline would make no version.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fsu_ray.gate import refuse_result
from fsu_ray.method import invert
from fsu_ray.method.augment import draw_moves, moved, seeded
from fsu_ray.method.context import Context, RunState, TargetSamples
from fsu_ray.method.filter import Mask
from fsu_ray.method.fit import predict
from fsu_ray.method.group import Group
from fsu_ray.method.masking import MaskedDataset
from fsu_ray.method.relearn import relearn
from fsu_ray.method.synthesize import Synthetic, starved_classes, synthesize
from fsu_ray.method.unlearn import measure, training_set
from fsu_ray.models.networks import Classifier, Generator
from fsu_ray.recipes import FilterRecipe, Recipe
from fsu_ray.work import BlobStore, WorkOrder

ENOUGH = 0.1
"""Coverage from which more of it counts no more: what a thin class costs shows on the reference, so this is for what
is all but missing. (With 0.5, recipes of one validation classifier were ranked worse: Spearman .89 instead of .96.)"""

FEWEST, MOST_FOLDS = 12, 3
"""Folds are made until that many target samples have been held out, or there are that many of them."""

APART = 7_919
"""Added to a seed: the reference shares no draw with a recipe under search."""


@dataclass(frozen=True)
class Parts:
    """What a recipe was found to be worth; all in [0, 1]. `samples` and `probes`: the two sides of forgetting.
    `reason`: why it is worth nothing."""

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
    """The score of these parts, as the module says."""
    kept = (3 * retention + stability) / 4
    both = forgetting + kept
    return 2 * forgetting * kept / both * math.sqrt(min(1.0, coverage / ENOUGH)) if both > 0 else 0.0


def reference(order: WorkOrder, store: BlobStore, device: torch.device, recipe: Recipe) -> Synthetic:
    """A D' of the order's root by a generator of `recipe`, whose seeds are moved apart from all others."""
    apart = recipe.model_copy(
        update={
            "invert": recipe.invert.model_copy(update={"seed": recipe.invert.seed + APART}),
            "synthesize": recipe.synthesize.model_copy(update={"seed": recipe.synthesize.seed + APART}),
        }
    )
    context = Context(replace(order, recipe=apart), store, device, None, None, RunState(), 0, Group())
    run = invert.begin(context.teacher, apart.invert)
    generator = invert.invert(context.teacher, apart.invert, run)
    return synthesize(context.teacher, generator, apart.synthesize)[0]


class Objective:
    """Scores recipes for `order` on the `reference` (see the function of that name). Needs two target samples."""

    def __init__(self, order: WorkOrder, store: BlobStore, device: torch.device, reference: Synthetic) -> None:
        self._order, self._store, self._device = order, store, device
        context = self._context(order.recipe)
        self.teacher = context.teacher
        self._samples = context.given[0].samples
        masking = MaskedDataset(context, reference, "")
        mask = masking.select(FilterRecipe(), order.targets[0].behaviour, self._samples)
        self._probes = reference.pixels[mask.is_forget]
        self._expected = _beneath(
            reference.logits[mask.is_forget], context.gone_after, order.targets[0].behaviour.targets
        )
        rest = ~mask.is_forget
        for earlier in masking.earlier:
            rest &= ~earlier.is_forget
        self._rest = reference.pixels[rest]
        self._views = moved(self._rest.float() / 255, draw_moves(len(self._rest), seeded(APART)), order.spec.flip)
        self._views = (self._views * 255).round().byte()
        self._parent = [predict(context.current, pixels).argmax(1) for pixels in (self._rest, self._views)]

    def score(self, recipe: Recipe, generator: Generator) -> Parts:
        """What `recipe` is worth with `generator`, from which D' is drawn."""
        return self.judge(recipe, synthesize(self.teacher, generator, recipe.synthesize)[0])

    def judge(self, recipe: Recipe, dataset: Synthetic) -> Parts:
        """What `recipe` is worth with D' `dataset`, which is filtered and relearned once for each fold."""
        context = self._context(recipe)
        count = torch.bincount(dataset.predicted, minlength=context.classes).tolist()
        counts = [count[k] for k in range(context.classes) if k not in context.gone]
        starved = [k for k in starved_classes(count, recipe.synthesize) if k not in context.gone]
        if starved:
            return Parts(0.0, reason=f"starved classes {starved}")
        coverage = min(counts) / (sum(counts) / len(counts))
        found: list[tuple[float, ...]] = []
        for held_out in self._folds(recipe):
            context.given = (TargetSamples(self._order.targets[0], self._samples, held_out),)
            masking = MaskedDataset(context, dataset, "")
            mask = masking.select(recipe.filter, self._order.targets[0].behaviour, context.given[0].train)
            if not bool(mask.is_forget.any()):
                return Parts(0.0, coverage=coverage, reason="nothing found")
            child = self._relearned(context, masking, mask)
            found.append((*self._measure(context, child, held_out), self._passes(context, masking, mask, child)))
        means = (sum(column) / len(found) for column in zip(*found, strict=True))
        samples, probes, retention, stability, passed = means
        forgetting = (samples + probes) / 2
        score = passed * combine(forgetting, retention, stability, coverage)
        return Parts(score, forgetting, samples, probes, retention, stability, coverage, passed)

    def _context(self, recipe: Recipe) -> Context:
        order = replace(self._order, recipe=recipe)
        return Context(order, self._store, self._device, None, None, RunState(), 0, Group())

    def _folds(self, recipe: Recipe) -> list[Tensor]:
        """Which samples each fold holds out (M,): the share that a run holds out, others each time."""
        m = len(self._samples)
        order = torch.randperm(m, generator=seeded(recipe.relearn.seed, APART))
        each = max(1, round(recipe.gate.holdout_samples * m))
        folds = min(MOST_FOLDS, m // each, -(-FEWEST // each))
        none = torch.zeros(m, dtype=torch.bool)
        return [none.index_fill(0, part, True) for part in torch.split(order, each)[:folds]]

    def _relearned(self, context: Context, masking: MaskedDataset, mask: Mask) -> Classifier:
        child = copy.deepcopy(context.current)
        relearn(child, *training_set(context, masking, [mask]), context.recipe.relearn)
        return child

    def _passes(self, context: Context, masking: MaskedDataset, mask: Mask, child: Classifier) -> bool:
        """Whether the gate would let a relearned classifier pass, whatever it makes of the held-out samples."""
        (report,) = measure(context, masking, [mask], child)
        report["forgetting"]["samples_in_target"] = None
        return refuse_result(report, context.recipe.gate) is None

    def _measure(self, context: Context, child: Classifier, held_out: Tensor) -> tuple[float, float, float, float]:
        """What is forgotten of samples and of probes, retention and stability of a relearned classifier."""
        behaviour, unseen = self._order.targets[0].behaviour, self._samples[held_out]
        expected = _beneath(predict(context.teacher, unseen), context.gone_after, behaviour.targets)
        left = []
        for pixels, home in ((unseen, expected), (self._probes, self._expected)):
            if len(pixels):
                answer = predict(child, pixels).argmax(1)
                away = ~torch.isin(answer, torch.tensor(behaviour.targets))
                left.append(float((away if behaviour.kind == "class" else answer == home).float().mean()))
        kept = [
            _agreement(predict(child, pixels).argmax(1), before, context.classes)
            for pixels, before in zip((self._rest, self._views), self._parent, strict=True)
        ]
        return left[0], left[-1], kept[0], kept[1]


def _beneath(logits: Tensor, gone: Sequence[int], targets: Sequence[int]) -> Tensor:
    """The class (N,) that logits (N, K) name once the erased and the target classes are out."""
    out = torch.zeros(logits.shape[1], dtype=torch.bool)
    out[[*gone, *targets]] = True
    return logits.masked_fill(out, -torch.inf).argmax(1)


def _agreement(after: Tensor, before: Tensor, classes: int) -> float:
    """Share of the samples that keep their class (N,), mean over the classes that there were."""
    same = (after == before).float()
    shares = [same[before == k].mean() for k in range(classes) if bool((before == k).any())]
    return float(torch.stack(shares).mean()) if shares else 0.0
