"""The supervised loop and relearning."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F

from fsu_ray.method.filter import relabel
from fsu_ray.method.fit import TrainingSchedule, fit, predict
from fsu_ray.method.relearn import relearn
from fsu_ray.models.architectures import batch_norms
from fsu_ray.recipes import RelearnRecipe

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(n: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes told apart by their brightness: pixels (N, 1, 16, 16) uint8 and labels (N,)."""
    rng = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 30, (n, 1, 16, 16), generator=rng)
    return (labels.view(-1, 1, 1, 1) * 100 + noise).byte(), labels


def statistics(network) -> list[torch.Tensor]:
    """Copies of all running statistics."""
    return [t.clone() for m in batch_norms(network) for t in (m.running_mean, m.running_var, m.num_batches_tracked)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "schedule",
    [TrainingSchedule(2, 16), TrainingSchedule(1, 16, precision="bf16"), TrainingSchedule(2, 20, one_cycle=False)],
)
def test_the_same_seed_gives_the_same_weights(classifier, schedule):
    """Two fits agree byte for byte whatever torch's own stream is at; another seed gives other weights."""
    digests = []
    for seed in (0, 0, 1):
        network = classifier()
        torch.manual_seed(len(digests))
        fit(network, *problem(), TrainingSchedule(**{**vars(schedule), "seed": seed}), flip=True)
        digests.append(hashlib.sha256(network.to_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_one_step_is_sgd_with_cross_entropy(classifier):
    """One batch, no momentum, no decay, no view: w - lr * gradient, lr at the start of the cycle."""
    network, reference = classifier(), classifier()
    pixels, labels = torch.zeros(8, 1, 16, 16, dtype=torch.uint8), torch.arange(8) % 3  # a view of black is black
    schedule = TrainingSchedule(1, 8, lr=0.5, momentum=0, weight_decay=0, frozen_statistics=True)
    for one_cycle, share in ((True, 0.1), (False, 1.0)):
        fit(network, pixels, labels, TrainingSchedule(**{**vars(schedule), "one_cycle": one_cycle}))
        F.cross_entropy(reference(pixels / 255), labels).backward()
        with torch.no_grad():
            for p in reference.parameters():
                p -= 0.5 * share * p.grad
                p.grad = None
        for mine, expected in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_class_numbers_and_one_hot_targets_are_one(classifier):
    """Soft labels generalise class numbers."""
    first, second = classifier(), classifier()
    pixels, labels = problem()
    fit(first, pixels, labels, TrainingSchedule(2, 16))
    fit(second, pixels, F.one_hot(labels, 3).float(), TrainingSchedule(2, 16))
    torch.testing.assert_close(predict(first, pixels), predict(second, pixels), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_stay_and_others_move(classifier, frozen):
    """BatchNorm's running statistics change only in training that may change them; weights change in both."""
    network = classifier("preactresnet18:2")
    before, weights = statistics(network), [p.clone() for p in network.parameters()]
    fit(network, *problem(), TrainingSchedule(1, 16, frozen_statistics=frozen))
    assert same(before, statistics(network)) == frozen
    assert not same(weights, list(network.parameters()))
    assert not network.training


def test_the_loss_falls(classifier):
    """A tiny problem is learned, and progress tells of each epoch."""
    network, heard = classifier(), []
    pixels, labels = problem()
    fit(network, pixels, labels, TrainingSchedule(12, 16), on_epoch=lambda *a: heard.append(a))
    assert [(done, total) for done, total, _ in heard] == [(i, 12) for i in range(1, 13)]
    assert heard[-1][2]["loss"] < 0.5 * heard[0][2]["loss"]
    assert float((predict(network, pixels).argmax(1) == labels).float().mean()) > 0.9


def test_predict_does_not_depend_on_the_batch(classifier):
    """Logits in parts are those of the whole, without gradient, in eval mode."""
    network, (pixels, _) = classifier().train(), problem(10)
    whole = predict(network, pixels)
    assert not network.training
    assert not whole.requires_grad
    assert whole.dtype == torch.float32
    torch.testing.assert_close(predict(network, pixels, batch=3), whole)
    assert predict(network, pixels[:0]).shape == (0, 3)


@pytest.fixture
def learned(classifier):
    """A classifier that knows the problem, and its data."""
    network, (pixels, labels) = classifier(), problem()
    fit(network, pixels, labels, TrainingSchedule(12, 16))
    return network, pixels, labels


def test_relearning_moves_mass_off_the_target(learned):
    """After relearning with class 2 masked, nobody is told 2, the others keep theirs, and the statistics stay."""
    network, pixels, labels = learned
    allowed = torch.ones(len(pixels), 3, dtype=torch.bool)
    allowed[:, 2] = False
    before, logits = statistics(network), predict(network, pixels)
    drawn = torch.zeros(len(pixels), dtype=torch.bool)
    child = relearn(network, pixels, relabel(logits, allowed), drawn, RelearnRecipe(epochs=12, batch=8, lr=1.5e-3))
    assert torch.equal(predict(network, pixels), logits), "the parent is left as it was"
    after = predict(child, pixels)
    mass = after.softmax(1)[labels == 2, 2].mean() / logits.softmax(1)[labels == 2, 2].mean()
    assert float(mass) < 0.3
    assert not bool((after.argmax(1) == 2).any())
    kept = labels != 2
    assert float((after.argmax(1) == labels)[kept].float().mean()) > 0.9
    assert same(before, statistics(child))
    assert not child.training


def test_relearning_trains_as_the_recipe_says(learned, monkeypatch):
    """Its learning rate and seed, held and then let down, with BatchNorm's statistics frozen; D' is augmented where
    the recipe says so, the given samples always are."""
    network, pixels, _ = learned
    seen = []
    monkeypatch.setattr("fsu_ray.method.relearn.fit", lambda c, p, t, s, **more: seen.append((s, more["as_they_are"])))
    synthetic = torch.tensor([True, True, False, False])
    for augment in ("samples", "all"):
        recipe = RelearnRecipe(lr=0.01, seed=5, augment=augment, precision="bf16")
        relearn(network, pixels[:4], torch.rand(4, 3), synthetic, recipe)
    schedule, still = seen[0]
    assert schedule.frozen_statistics
    assert (schedule.one_cycle, schedule.lr, schedule.seed, schedule.precision) == (False, 0.01, 5, "bf16")
    assert still is synthetic
    assert seen[1][1] is None


def test_what_is_to_stay_as_it_is_is_not_augmented():
    """The classifier sees those samples to the bit, and the others turned and shifted."""
    pixels = torch.randint(0, 256, (6, 1, 32, 32), dtype=torch.uint8)
    met = []

    class Watch(torch.nn.Linear):
        def forward(self, x):
            met.append(x.detach().clone())
            return super().forward(x.flatten(1))

    still = torch.tensor([True, False] * 3)
    fit(Watch(32 * 32, 2), pixels, torch.zeros(6, dtype=torch.int64), TrainingSchedule(1, 6), as_they_are=still)
    (batch,) = met
    unit = pixels.float() / 255
    unchanged = [any(torch.equal(seen, one) for seen in batch) for one in unit]
    assert unchanged == still.tolist()
