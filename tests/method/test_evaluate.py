"""Measures: closed forms, and None where there is nothing to measure on."""

from __future__ import annotations

import math

import pytest
import torch

from fsu_ray.method.evaluate import accuracy, attack_auc, bn_distance, generator_metrics, retention, share_in
from fsu_ray.method.fit import predict
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.models.architectures import batch_norms
from fsu_ray.models.hooks import observe

pytestmark = pytest.mark.usefixtures("one_thread")
SURE = torch.tensor([[9.0, 0.0, 0.0]])
UNSURE = torch.tensor([[0.1, 0.0, 0.0]])


def certain(labels: list[int], classes: int = 3) -> torch.Tensor:
    """Logits that say `labels`."""
    return 9.0 * torch.nn.functional.one_hot(torch.tensor(labels), classes).float()


@pytest.mark.parametrize(
    ("members", "others", "auc"),
    [
        (SURE.repeat(4, 1), UNSURE.repeat(3, 1), 1.0),
        (UNSURE.repeat(4, 1), SURE.repeat(3, 1), 0.0),
        (SURE.repeat(4, 1), SURE.repeat(3, 1), 0.5),
        (torch.cat((SURE, UNSURE)), torch.cat((SURE, UNSURE)), 0.5),
        (torch.cat((SURE, UNSURE)), UNSURE, 0.75),
        (torch.cat((SURE, SURE, UNSURE)), torch.cat((UNSURE, SURE)), (1 + 0.5 + 1 + 0.5 + 0.5 + 0) / 6),
    ],
)
def test_attack_auc_counts_pairs(members, others, auc):
    """The area is the share of pairs whose member is the surer one, ties by half."""
    assert attack_auc(members, others) == pytest.approx(auc)


def test_nothing_to_measure_on_is_none():
    """Empty sets give None, not 0 and not nan."""
    none = torch.zeros(0, 3)
    assert attack_auc(none, SURE) is None
    assert attack_auc(SURE, none) is None
    assert share_in(none, [1]) is None


@pytest.mark.parametrize(("targets", "share"), [([0], 0.5), ([1], 0.25), ([0, 1, 2], 1.0), ((1, 2), 0.5)])
def test_share_in_counts_predictions(targets, share):
    """Predictions 0, 0, 1, 2."""
    assert share_in(certain([0, 0, 1, 2]), targets) == share


def test_retention_in_closed_form():
    """Agreement in all and by the parent's class; mean KL(parent || child) by hand."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.8, 0.1]])
    found = retention(p.log(), q.log(), 3)
    assert found["agreement"] == 0.5
    assert found["by_class"] == [0.0, 1.0, None]
    expected = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert found["kl_to_parent"] == pytest.approx(expected / 2, abs=1e-6)
    assert found["samples"] == 2


def test_retention_of_the_same_is_whole():
    """The same logits: agreement 1, KL 0. No samples at all: agreement 0, so that a gate refuses."""
    logits = torch.randn(9, 3)
    found = retention(logits, logits.clone(), 3)
    assert (found["agreement"], found["kl_to_parent"]) == (1.0, 0.0)
    assert retention(logits[:0], logits[:0], 3) == {
        "agreement": 0.0,
        "by_class": [None] * 3,
        "kl_to_parent": 0.0,
        "samples": 0,
    }


def test_accuracy_by_class(classifier):
    """Retained, erased and each class, against counts by hand; a class without samples is None."""
    judge = classifier(classes=4)
    pixels = torch.randint(0, 256, (12, 1, 16, 16), dtype=torch.uint8)
    seen = predict(judge, pixels).argmax(1)
    labels = torch.arange(12) % 3  # none of class 3
    labels[:3] = torch.where(seen[:3] < 3, seen[:3], 0)  # and some that are right
    right = seen == labels
    assert bool(right.any())
    found = accuracy(judge, pixels, labels, [2, 3])
    gone = labels == 2
    assert found["retained"] == pytest.approx(float(right[~gone].float().mean()))
    assert found["erased"] == pytest.approx(float(right[gone].float().mean()))
    for k in range(4):
        of = right[labels == k].float()
        assert found["by_class"][k] == (pytest.approx(float(of.mean())) if len(of) else None)
    assert found["by_class"][3] is None
    assert accuracy(judge, pixels, labels, [])["erased"] is None


def settle(judge, pixels: torch.Tensor) -> None:
    """Give every BatchNorm the statistics of `pixels`, layer after layer, as each changes what the next one sees."""
    for i, layer in enumerate(batch_norms(judge)):
        with torch.no_grad(), observe(judge) as seen:
            judge(pixels.float() / 255)
        layer.running_mean.copy_(seen.statistics[i][0])
        layer.running_var.copy_(seen.statistics[i][1])


@pytest.mark.parametrize("arch", ["lenet5", "preactresnet18:2"])
def test_bn_distance_is_zero_for_what_the_layers_remember(classifier, arch):
    """0 for the data the statistics come from, and above 0 for others."""
    judge = classifier(arch)
    pixels = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
    settle(judge, pixels)
    assert bn_distance(judge, pixels) < 1e-3
    assert bn_distance(judge, pixels // 4) > 0.3


def test_bn_distance_counts_running_deviations(classifier):
    """One layer two deviations off, in every channel, and the other at home: the mean of 2 and 0."""
    judge = classifier()
    pixels = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
    settle(judge, pixels)
    last = judge.network.bn2
    with torch.no_grad():
        last.running_mean += 2 * last.running_var.sqrt()
    assert bn_distance(judge, pixels) == pytest.approx(1.0, abs=0.01)


def test_generator_metrics_leave_erased_classes_out(classifier):
    """Acceptance and coverage count the classes that are needed; agreement counts the untouched samples."""
    judge = classifier()
    pixels = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8)
    logits = predict(judge, pixels)
    wrong = logits.clone()
    wrong[:6] = -wrong[:6]  # another class for six samples
    dataset = Synthetic(pixels, wrong, torch.zeros(30), torch.zeros(30).long(), torch.zeros(30) > 0)
    drawn = {"acceptance": [0.5, 0.25, 0.01], "count": [15, 10, 0]}
    free, untouched = torch.ones(30, 3, dtype=torch.bool), torch.arange(30) >= 3
    found = generator_metrics(judge, dataset, drawn, free, untouched, [2], [])
    assert found["acceptance"] == 0.25
    assert found["coverage"] == pytest.approx(10 / 12.5)
    assert found["agreement"] == pytest.approx(24 / 27)
    assert found["starved"] == []
    assert generator_metrics(judge, dataset, drawn, free, untouched, [], [2])["coverage"] == 0
    assert generator_metrics(judge, dataset, drawn, free, torch.zeros(30) > 0, [2], [])["agreement"] == 0


def test_generator_metrics_expect_no_class_that_is_masked(classifier):
    """Where a mask takes the first class away, agreement is with the best class that is left."""
    judge = classifier()
    pixels = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8)
    current = predict(judge, pixels).argmax(1)
    root = torch.nn.functional.one_hot(current, 3) + 5.0 * torch.nn.functional.one_hot((current + 1) % 3, 3)
    allowed = torch.nn.functional.one_hot((current + 1) % 3, 3) == 0
    dataset = Synthetic(pixels, root, torch.zeros(8), torch.zeros(8).long(), torch.zeros(8) > 0)
    drawn = {"acceptance": [1.0] * 3, "count": [3] * 3}
    all_of_them = torch.ones(8, dtype=torch.bool)
    assert generator_metrics(judge, dataset, drawn, allowed, all_of_them, [], [])["agreement"] == 1
    assert generator_metrics(judge, dataset, drawn, allowed | True, all_of_them, [], [])["agreement"] == 0
