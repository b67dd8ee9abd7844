"""One erasure from a work order to an outcome: invert or reuse, synthesize, filter, relearn, evaluate.

The stages run in this order in any process; Ray workers and plain scripts call the same `unlearn`.
Bytes come from and go to a `BlobStore`, so a checkpoint holds digests (and, during the inversion,
the generator and its optimiser), and a resumed run repeats at most one stage.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fsu_ray.method import evaluate, reporting
from fsu_ray.method.context import Checkpoint, Context, ProgressCallback, RunState, load_samples, save_samples
from fsu_ray.method.filter import Mask, relabel
from fsu_ray.method.fit import predict
from fsu_ray.method.group import Group
from fsu_ray.method.masking import MaskedDataset
from fsu_ray.method.obtain import obtain
from fsu_ray.method.relearn import relearn
from fsu_ray.models.networks import Classifier
from fsu_ray.records import Digest
from fsu_ray.work import BlobStore, Outcome, TargetResult, WorkOrder


def unlearn(
    order: WorkOrder,
    store: BlobStore,
    device: torch.device,
    progress: ProgressCallback | None = None,
    checkpoint: Checkpoint | None = None,
    saved: RunState | None = None,
    every: int = 100,
    group: Group | None = None,
) -> Outcome:
    """Carry out `order` and return what came of it; nothing is judged here but the generator.

    `progress(stage, done, total, figures)` hears of every stage, `checkpoint` gets the state after
    each and every `every` steps of the inversion; a run that gets such a state as `saved` goes on
    from it. Raises StorageError where an artifact is missing.

    The ranks of `group` call this in step, with the same arguments, and share the inversion, the synthesis and the
    relearning; what takes a moment (filter, evaluation, artifacts) the first one does for all. `checkpoint` is called
    on all of them, `progress` on the first.
    """
    group = group or Group()
    context = group.together(
        lambda: Context(order, store, device, progress, checkpoint, saved or RunState(), every, group)
    )
    masking = obtain(context)
    reason = _refusal(context) or _starvation(context)
    reports: list[dict[str, Any]] = [{} for _ in order.targets]
    probes: list[Digest] = []
    if reason is None:
        masks = _filter(context, masking)
        probes = group.once(lambda: [store.put(save_samples(masking.dataset.pixels[mask.is_forget])) for mask in masks])
        reason = _nothing_found(context, masks) or _relearn(context, masking, masks)
        if reason is None:
            reports = _evaluate(context, masking, masks)
    done = asdict(context.saved)
    return Outcome(
        reason=reason,
        generator_use=done["use"],
        generator_weights=done["generator"],
        dataset=done["dataset"],
        metrics=done["metrics"],
        refused=tuple(done["refused"]),
        weights=done["weights"],
        targets=tuple(
            TargetResult(target.request, mask, probe, report)
            for target, mask, probe, report in zip_longest(
                order.targets, done["masks"] if probes else (), probes, reports
            )
        ),
        seconds={stage: round(t, 2) for stage, t in done["seconds"].items()},
        resumed=tuple(done["resumed_at"]),
    )


def _refusal(context: Context) -> str | None:
    """`generator_refused` with the gate's verdict on the generator that the request asks for: no other may serve."""
    order, verdict = context.order, "; ".join(context.saved.refused)
    named = order.generators.reuse or order.generators.transfer
    if not order.generators.required or not verdict or named is None:
        return None
    return f"generator_refused: the gate refuses {named.id} for this version: {verdict}; ask without --generator"


def _starvation(context: Context) -> str | None:
    """`starved_class` with the classes that D' cannot stand in for, if there are any."""
    starved = context.saved.metrics["starved"]
    if not starved:
        return None
    return (
        f"starved_class: D' holds too few samples of {starved}; "
        "try more invert.steps, a higher synthesize.entropy_threshold, or other loss weights"
    )


def _filter(context: Context, masking: MaskedDataset) -> list[Mask]:
    """The mask over D' of each behaviour of this run."""
    started = time.monotonic()
    context.tell("filter", 0, 1)
    saved = context.saved
    if not saved.masks:
        saved.masks = context.group.once(lambda: _select(context, masking))
        context.finish("filter", started)
    masks = context.group.together(lambda: [Mask.from_bytes(context.store.get(mask)) for mask in saved.masks])
    context.tell("filter", 1, 1, {"found": sum(int(mask.is_forget.sum()) for mask in masks)})
    return masks


def _select(context: Context, masking: MaskedDataset) -> list[str]:
    masks = (masking.select(context.recipe.filter, each.behaviour, each.train) for each in context.given)
    return [context.store.put(mask.to_bytes()) for mask in masks]


def _nothing_found(context: Context, masks: list[Mask]) -> str | None:
    empty = [each for each, mask in zip(context.given, masks, strict=True) if not bool(mask.is_forget.any())]
    if not empty:
        return None
    return (
        f"nothing_found: no sample of D' resembles the target samples of {empty[0].behaviour.name}; give more samples, "
        "set filter.policy to class (whole classes) or manual (with filter.threshold), or, for a subset, lower "
        "filter.runner_up or take fewer invert.steps: a long inversion draws little that the classifier is unsure of"
    )


def _relearn(context: Context, masking: MaskedDataset, masks: list[Mask]) -> str | None:
    """From the current version, on D' under all masks and on the given samples, relabelled.

    `retention_lost` where it diverged: such weights are not worth a measure.
    """
    if context.saved.weights is not None:
        return None
    started = time.monotonic()
    context.tell("relearn", 0, context.recipe.relearn.epochs)
    child = copy.deepcopy(context.current)
    relearn(
        child,
        *context.group.once(lambda: training_set(context, masking, masks)),
        context.recipe.relearn,
        lambda epoch, epochs, losses: context.tell("relearn", epoch, epochs, losses),
        context.group,
    )
    if not all(bool(t.isfinite().all()) for t in child.parameters()):
        return "retention_lost: the relearning diverged; try a lower relearn.lr"
    context.saved.weights = context.group.once(lambda: context.store.put(child.to_bytes()))
    context.finish("relearn", started)
    return None


def training_set(context: Context, masking: MaskedDataset, masks: list[Mask]) -> tuple[Tensor, Tensor, Tensor]:
    """D_unlearn: pixels (N, C, H, W), soft labels (N, K), and which are of D' (N,): the others are the given samples.

    The given samples come in `repeats` times, and the few D_e-like samples of a subset that often again. The samples
    of earlier subsets are given too while they have not been purged, which keeps those from coming back.
    """
    dataset, recipe, store = masking.dataset, context.recipe.relearn, context.store
    allowed = masking.allowed(masks)
    usable = ~masking.held_out(masks) & allowed.any(1)
    again = (masking.subset_forget(masks) & usable).nonzero()
    train = torch.cat([usable.nonzero(), *[again] * recipe.repeats]).flatten()
    pixels, labels = [dataset.pixels[train]], [relabel(dataset.logits[train], allowed[train])]
    given = [(each.train, each.behaviour) for each in context.given]
    for prior in context.earlier_erasures:
        if prior.behaviour.kind == "subset" and store.has(prior.samples):
            given.append((load_samples(store.get(prior.samples)), prior.behaviour))
    for samples, behaviour in given:
        left = torch.ones((len(samples), dataset.logits.shape[1]), dtype=torch.bool)
        left[:, [*behaviour.targets, *context.gone_after]] = False
        if bool(left.any()):
            pixels += [samples] * recipe.repeats
            labels += [relabel(predict(context.teacher, samples), left)] * recipe.repeats
    found = torch.cat(pixels)
    return found, torch.cat(labels), torch.arange(len(found)) < len(train)


def _evaluate(context: Context, masking: MaskedDataset, masks: list[Mask]) -> list[dict[str, Any]]:
    """A report for each behaviour of this run; their keys are described in `method.reporting` and `method.evaluate`."""
    started = time.monotonic()
    context.tell("evaluate", 0, 1)
    reports = context.group.once(lambda: _measure(context, masking, masks))
    context.finish("evaluate", started)
    context.tell("evaluate", 1, 1, {"agreement": reports[0]["retention"]["agreement"]})
    return reports


def _measure(context: Context, masking: MaskedDataset, masks: list[Mask]) -> list[dict[str, Any]]:
    order = context.order
    assert context.saved.weights is not None
    child = context.classifier(context.saved.weights)
    test = reporting.on_test_set(order, context.current, child, context.gone_after)
    return [{**report, **test} for report in measure(context, masking, masks, child)]


def measure(context: Context, masking: MaskedDataset, masks: list[Mask], child: Classifier) -> list[dict[str, Any]]:
    """What the gate judges `child` by, for each behaviour of the run: by D', target samples and probes alone."""
    order, dataset = context.order, masking.dataset
    before, after = predict(context.current, dataset.pixels), predict(child, dataset.pixels)
    kept = dataset.holdout.clone()
    for each in (*masking.earlier, *masks):
        kept &= ~each.is_forget
    shared: dict[str, Any] = {
        "retention": evaluate.retention(before[kept], after[kept], order.spec.classes),
        "earlier": [reporting.earlier(context.store, child, prior) for prior in order.earlier_erasures],
    }
    unseen = masking.held_out(masks)
    return [
        {"forgetting": reporting.forgetting(given, context.current, child, mask, unseen, before, after), **shared}
        for given, mask in zip(context.given, masks, strict=True)
    ]
