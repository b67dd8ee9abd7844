"""The parts of a request's report that need its target samples, probes and test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fsu_ray.errors import InvalidData
from fsu_ray.method import evaluate
from fsu_ray.method.context import TargetSamples, load_samples
from fsu_ray.method.datasets import load
from fsu_ray.method.filter import Mask
from fsu_ray.method.fit import predict
from fsu_ray.models.networks import Classifier
from fsu_ray.work import BlobStore, EarlierErasure, WorkOrder


def forgetting(
    given: TargetSamples,
    current: Classifier,
    child: Classifier,
    mask: Mask,
    unseen: Tensor,
    before: Tensor,
    after: Tensor,
) -> dict[str, Any]:
    """Shares that still get a target class, and the membership attack on the target samples.

    Of the target samples those that were held out are measured, all where there are none; of D' the probes, and
    of these those `unseen` (N,) in training, by their logits (N, K) before and after.
    """
    targets, samples, held_out = given.behaviour.targets, given.samples, given.held_out
    unseen = mask.is_forget & unseen
    measured = samples[held_out] if bool(held_out.any()) else samples
    return {
        "samples_in_target": evaluate.share_in(predict(child, measured), targets),
        "samples_in_target_before": evaluate.share_in(predict(current, measured), targets),
        "samples_held_out": int(held_out.sum()),
        "samples_given": len(samples),
        "probes_in_target": evaluate.share_in(after[mask.is_forget], targets),
        "probes_in_target_before": evaluate.share_in(before[mask.is_forget], targets),
        "probes_held_out_in_target": evaluate.share_in(after[unseen], targets),
        "probes": int(mask.is_forget.sum()),
        "probes_held_out": int(unseen.sum()),
        "policy": mask.policy,
        "threshold": mask.threshold,
        "attack_auc_before": evaluate.attack_auc(predict(current, samples), before[mask.is_forget]),
        "attack_auc": evaluate.attack_auc(predict(child, samples), after[mask.is_forget]),
    }


def earlier(store: BlobStore, child: Classifier, prior: EarlierErasure) -> dict[str, Any]:
    """An earlier erasure's probes on the new classifier, beside the share recorded when it was erased."""
    pixels = load_samples(store.get(prior.probes))
    return {
        "behaviour": prior.behaviour.name,
        "request": prior.request,
        "probes_in_target": evaluate.share_in(predict(child, pixels), prior.behaviour.targets),
        "recorded": prior.recorded,
    }


def on_test_set(order: WorkOrder, current: Classifier, child: Classifier, away: Sequence[int]) -> dict[str, Any]:
    """`test`: accuracy on the labelled test set, before and after, None if the model line names none; `away`: the
    erased classes. Nothing hangs on it, so where a worker does not find the set, `test_missing` says so instead."""
    if order.test_set is None:
        return {"test": None}
    try:
        images = load(order.test_set, "test", order.spec.shape)
    except InvalidData:
        return {"test": None, "test_missing": "the test set of the model cannot be read where this run was"}
    return {
        "test": {
            "before": evaluate.accuracy(current, images.pixels, images.labels, away),
            "after": evaluate.accuracy(child, images.pixels, images.labels, away),
        }
    }
