"""Measures, and the report of a run. Most need only D', masks and target samples; accuracies need a labelled test set.

All shares lie in [0, 1]; None where there is nothing to measure. They measure approximate unlearning; they are no
guarantee.

The report of a target has the keys `forgetting` (see `forgetting`), `retention` (see `retention`), `earlier` (a list,
see `earlier_erasure`) and `test` (see `on_test_set`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsu_ray.errors import InvalidData
from fsu_ray.method.datasets import load
from fsu_ray.method.fit import predict
from fsu_ray.method.inputs import RunInputs, load_samples
from fsu_ray.method.masking import ForgetSet, MaskedDataset
from fsu_ray.method.synthesize import Synthetic, entropy
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.hooks import observe
from fsu_ray.work import BlobStore, EarlierErasure, WorkOrder


def share_in(logits: Tensor, targets: Sequence[int]) -> float | None:
    """Share of the samples, logits (N, K), whose predicted class is one of `targets`."""
    if not len(logits):
        return None
    return float(torch.isin(logits.argmax(1), torch.tensor(targets)).float().mean())


def attack_auc(members: Tensor, others: Tensor) -> float | None:
    """Membership inference by output entropy: the area under the ROC curve of "low entropy means member".

    logits (N, K) and (M, K). 0.5: the attack learns nothing; 1: members are told apart by it.
    """
    if not len(members) or not len(others):
        return None
    a, b = entropy(members), entropy(others)
    less = (a[:, None] < b[None]).float() + 0.5 * (a[:, None] == b[None]).float()
    return float(less.mean())


def retention(before: Tensor, after: Tensor, classes: int) -> dict[str, Any]:
    """How much of the parent is kept on the same samples: logits (N, K) before and after.

    `agreement`: same predicted class. `by_class`: the same by the parent's class, None where it sees
    none. `kl_to_parent`: mean KL(parent || child) in nats. `samples`: N.
    """
    same = (before.argmax(1) == after.argmax(1)).float()
    parent = before.argmax(1)
    by_class = [float(same[parent == k].mean()) if bool((parent == k).any()) else None for k in range(classes)]
    log_p, log_q = before.log_softmax(1), after.log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean() if len(same) else torch.zeros(())
    return {
        "agreement": float(same.mean()) if len(same) else 0.0,
        "by_class": by_class,
        "kl_to_parent": float(kl),
        "samples": len(same),
    }


def accuracy(classifier: Classifier, pixels: Tensor, labels: Tensor, erased: Sequence[int]) -> dict[str, Any]:
    """Accuracy on a labelled test set: `retained` (D_r: classes not in `erased`), `erased` (D_e), `by_class`."""
    right = (predict(classifier, pixels).argmax(1) == labels).float()
    is_erased = torch.isin(labels, torch.tensor(sorted(erased), dtype=torch.int64))
    by_class = [
        float(right[labels == k].mean()) if bool((labels == k).any()) else None for k in range(classifier.spec.classes)
    ]
    return {
        "retained": float(right[~is_erased].mean()) if bool((~is_erased).any()) else None,
        "erased": float(right[is_erased].mean()) if bool(is_erased.any()) else None,
        "by_class": by_class,
    }


@torch.no_grad()
def bn_distance(classifier: Classifier, pixels: Tensor) -> float:
    """How far uint8 samples (N, C, H, W) lie from what the BatchNorm layers remember, in running standard deviations.

    Root mean square over channels of (batch mean - running mean) / running deviation, mean over layers;
    a number beyond any bound where there are no samples.
    """
    if not len(pixels):
        return 1e9
    device = next(classifier.parameters()).device
    classifier.eval()
    with observe(classifier) as seen:
        classifier(pixels.to(device).float() / 255)
    shifts = [
        ((mean - running_mean).square() / (running_variance + 1e-5)).mean().sqrt()
        for mean, _, running_mean, running_variance in seen.statistics
    ]
    return float(torch.stack(shifts).mean())


def generator_metrics(
    classifier: Classifier,
    dataset: Synthetic,
    drawn: dict[str, Any],
    allowed: Tensor,
    retained: Tensor,
    erased_classes: Sequence[int],
    starved: Sequence[int],
) -> dict[str, Any]:
    """The metrics by which `gate.refuse_generator` decides whether D' may serve `classifier`, the current version.

    `drawn` holds `acceptance` and `count` by class, from `synthesize`. allowed (N, K) bool: the classes that the masks
    in force leave to each sample. retained (N,) bool: the samples that are D_e-like under none of them. The
    `erased_classes` are erased as a whole and need no cover. `starved`: the other classes of which D' holds too few
    samples.
    """
    needed = [k for k in range(classifier.spec.classes) if k not in erased_classes]
    expected = dataset.logits.masked_fill(~allowed, -torch.inf).argmax(1)
    current = predict(classifier, dataset.pixels).argmax(1)
    counts = [drawn["count"][k] for k in needed]
    return {
        "acceptance": min(drawn["acceptance"][k] for k in needed),
        "acceptance_by_class": drawn["acceptance"],
        "coverage": min(counts) / max(sum(counts) / len(counts), 1e-9),
        "count_by_class": drawn["count"],
        "bn_distance": bn_distance(classifier, dataset.pixels[:: max(1, len(dataset) // 1000)]),
        "agreement": float((current == expected)[retained].float().mean()) if bool(retained.any()) else 0.0,
        "starved": list(starved),
    }


def measure(
    inputs: RunInputs, masked: MaskedDataset, forget_sets: Sequence[ForgetSet], child: Classifier
) -> list[dict[str, Any]]:
    """The report by which the gate judges the relearned classifier `child`, for each target of the run.

    It is measured on D', target samples and probes alone.
    """
    order, dataset = inputs.order, masked.dataset
    before, after = predict(inputs.current, dataset.pixels), predict(child, dataset.pixels)
    retained = dataset.holdout & masked.retained(forget_sets)
    shared: dict[str, Any] = {
        "retention": retention(before[retained], after[retained], order.spec.classes),
        "earlier": [earlier_erasure(inputs.store, child, erasure) for erasure in order.earlier_erasures],
    }
    held_out = masked.held_out(forget_sets)
    return [
        {"forgetting": forgetting(forget_set, inputs.current, child, held_out, before, after), **shared}
        for forget_set in forget_sets
    ]


def measure_with_test_set(
    inputs: RunInputs, masked: MaskedDataset, forget_sets: Sequence[ForgetSet], child: Classifier
) -> list[dict[str, Any]]:
    """The reports of `measure`, with the accuracies on the model's test set."""
    test = on_test_set(inputs.order, inputs.current, child, inputs.erased_classes_after)
    return [{**report, **test} for report in measure(inputs, masked, forget_sets, child)]


def forgetting(
    forget_set: ForgetSet, current: Classifier, child: Classifier, held_out: Tensor, before: Tensor, after: Tensor
) -> dict[str, Any]:
    """Shares that still get a target class, and the membership attack on the target samples.

    Measured are the target samples that were held out, or all where none were; and the probes, which are the D_e-like
    samples of D', by the logits of D' (N, K) before and after. held_out (N,) bool: the samples of D' that were not
    trained on.
    """
    target, mask = forget_set.target, forget_set.mask
    targets, samples, probes = target.behaviour.targets, target.pixels, mask.is_forget
    unseen = probes & held_out
    measured = samples[target.held_out] if bool(target.held_out.any()) else samples
    return {
        "samples_in_target": share_in(predict(child, measured), targets),
        "samples_in_target_before": share_in(predict(current, measured), targets),
        "samples_held_out": int(target.held_out.sum()),
        "samples_given": len(samples),
        "probes_in_target": share_in(after[probes], targets),
        "probes_in_target_before": share_in(before[probes], targets),
        "probes_held_out_in_target": share_in(after[unseen], targets),
        "probes": int(probes.sum()),
        "probes_held_out": int(unseen.sum()),
        "policy": mask.policy,
        "threshold": mask.threshold,
        "attack_auc_before": attack_auc(predict(current, samples), before[probes]),
        "attack_auc": attack_auc(predict(child, samples), after[probes]),
    }


def earlier_erasure(store: BlobStore, child: Classifier, erasure: EarlierErasure) -> dict[str, Any]:
    """The share of an earlier erasure's probes in a target class, on the new classifier and when it was erased."""
    pixels = load_samples(store.get(erasure.probes))
    return {
        "behaviour": erasure.behaviour.name,
        "request": erasure.request,
        "probes_in_target": share_in(predict(child, pixels), erasure.behaviour.targets),
        "recorded": erasure.recorded,
    }


def on_test_set(
    order: WorkOrder, current: Classifier, child: Classifier, erased_classes: Sequence[int]
) -> dict[str, Any]:
    """`test`: accuracies on the labelled test set before and after, None if the model names no test set.

    The gate does not need them, so where a worker cannot read the set, `test_missing` says so and the run goes on.
    """
    if order.test_set is None:
        return {"test": None}
    try:
        images = load(order.test_set, "test", order.spec.shape)
    except InvalidData:
        return {"test": None, "test_missing": "the test set of the model cannot be read where this run was"}
    return {
        "test": {
            "before": accuracy(current, images.pixels, images.labels, erased_classes),
            "after": accuracy(child, images.pixels, images.labels, erased_classes),
        }
    }
