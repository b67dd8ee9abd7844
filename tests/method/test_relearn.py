"""Relearning against a loop of its own, and what each setting of its recipe does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsu_ray.method.augment import seeded
from fsu_ray.method.group import Group
from fsu_ray.method.relearn import relearn
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import RelearnRecipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = RelearnRecipe(epochs=2, batch=2, lr=0.02, momentum=0.7, weight_decay=0.1, seed=3)
ALL = torch.ones(4, dtype=torch.bool)


def problem() -> tuple[Tensor, Tensor]:
    """Four samples (4, 1, 16, 16) uint8 and soft labels (4, 3)."""
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8, generator=rng)
    return pixels, torch.rand(4, 3, generator=rng).softmax(1)


def relearned(network: Classifier, synthetic: Tensor = ALL, recipe: RelearnRecipe = RECIPE, **more: Any) -> Tensor:
    """All weights of the relearned copy of `network`, as one vector."""
    child = relearn(network, *problem(), synthetic, recipe, **more)
    return torch.cat([p.detach().flatten() for p in child.parameters()])


def test_it_is_sgd_with_nesterov_momentum_on_the_soft_labels(classifier: Callable[..., Classifier]) -> None:
    """Two epochs of two batches: the rate is held for half of the steps and then let down, no statistics move."""
    network = classifier("preactresnet18:2")
    reference, (pixels, targets) = copy.deepcopy(network).eval(), problem()
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.02, momentum=0.7, weight_decay=0.1, nesterov=True)
    shares = iter([1.0, 1.0, 1.0, 0.5])
    for epoch in range(2):
        order = torch.randperm(4, generator=seeded(3, epoch))
        for batch in (order[:2], order[2:]):
            optimiser.param_groups[0]["lr"] = 0.02 * next(shares)
            optimiser.zero_grad()
            F.cross_entropy(reference(pixels[batch].float() / 255), targets[batch]).backward()
            optimiser.step()

    child = relearn(network, pixels, targets, ALL, RECIPE)

    for (name, mine), expected in zip(child.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_same_seed_gives_the_same_weights(classifier: Callable[..., Classifier]) -> None:
    network = classifier()
    assert torch.equal(relearned(network), relearned(network))
    assert not torch.equal(relearned(network), relearned(network, recipe=RECIPE.model_copy(update={"seed": 4})))


def test_synthetic_samples_are_augmented_only_where_the_recipe_says_so(classifier: Callable[..., Classifier]) -> None:
    """The given samples always are."""
    network, everything = classifier(), RECIPE.model_copy(update={"augment": "all"})
    assert not torch.equal(relearned(network), relearned(network, recipe=everything))
    assert torch.equal(relearned(network, ~ALL), relearned(network, recipe=everything))


def test_samples_are_mirrored_only_for_a_model_that_allows_it(classifier: Callable[..., Classifier]) -> None:
    mirrored = [relearned(classifier(flip=flip), ~ALL) for flip in (False, True)]
    assert not torch.equal(*mirrored)
    still = [relearned(classifier(flip=flip), ALL) for flip in (False, True)]
    assert torch.equal(*still)


def test_the_precision_is_that_of_the_recipe(classifier: Callable[..., Classifier]) -> None:
    network = classifier()
    assert not torch.equal(
        relearned(network), relearned(network, recipe=RECIPE.model_copy(update={"precision": "bf16"}))
    )


def test_progress_is_reported_after_each_epoch(classifier: Callable[..., Classifier]) -> None:
    calls: list[tuple[int, int]] = []
    relearned(classifier(), on_epoch=lambda done, total, metrics: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_the_ranks_of_the_group_share_each_batch(classifier: Callable[..., Classifier]) -> None:
    """A group that keeps the first sample of each batch to itself leaves the weights of another training."""

    class FirstAlone(Group):
        def share(self, n: int) -> slice:
            return slice(0, 1)

    network = classifier()
    assert not torch.equal(relearned(network), relearned(network, group=FirstAlone()))
