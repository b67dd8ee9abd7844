"""Measures. The data-free ones need only D', masks and target samples; the others a labelled test set.

All shares lie in [0, 1]; None where there is nothing to measure on. They are measures of approximate
unlearning, not a guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsu_ray.method.fit import predict
from fsu_ray.method.synthesize import Synthetic, entropy
from fsu_ray.models.networks import Classifier, observe


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
    gone = torch.isin(labels, torch.tensor(sorted(erased), dtype=torch.int64))
    by_class = [
        float(right[labels == k].mean()) if bool((labels == k).any()) else None for k in range(classifier.spec.classes)
    ]
    return {
        "retained": float(right[~gone].mean()) if bool((~gone).any()) else None,
        "erased": float(right[gone].mean()) if bool(gone.any()) else None,
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
    shifts = [((mean - kept).square() / (variance + 1e-5)).mean().sqrt() for mean, _, kept, variance in seen.statistics]
    return float(torch.stack(shifts).mean())


def generator_figures(
    classifier: Classifier,
    dataset: Synthetic,
    drawn: dict[str, Any],
    allowed: Tensor,
    untouched: Tensor,
    gone: Sequence[int],
    starved: Sequence[int],
) -> dict[str, Any]:
    """The figures by which `gate.refuse_generator` decides whether D' may serve `classifier`, the current version.

    `drawn`: the figures of `synthesize`. allowed (N, K) and untouched (N,): the classes left to each
    sample by the masks in force, and the samples that are D_e-like under none. `gone`: classes
    erased as a whole, which need no cover. `starved`: classes found starved among the others.
    """
    needed = [k for k in range(classifier.spec.classes) if k not in gone]
    expected = dataset.logits.masked_fill(~allowed, -torch.inf).argmax(1)
    current = predict(classifier, dataset.pixels).argmax(1)
    counts = [drawn["count"][k] for k in needed]
    return {
        "acceptance": min(drawn["acceptance"][k] for k in needed),
        "acceptance_by_class": drawn["acceptance"],
        "coverage": min(counts) / max(sum(counts) / len(counts), 1e-9),
        "count_by_class": drawn["count"],
        "bn_distance": bn_distance(classifier, dataset.pixels[:: max(1, len(dataset) // 1000)]),
        "agreement": float((current == expected)[untouched].float().mean()) if bool(untouched.any()) else 0.0,
        "starved": list(starved),
    }
