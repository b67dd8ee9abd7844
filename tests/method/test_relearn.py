"""Relearning against a loop of its own, and what each setting of its recipe does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsu_ray.method.augment import seeded
from fsu_ray.method.group import Group
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.relearn import relearn, training_set
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import RelearnRecipe
from fsu_ray.records import Behaviour

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


def test_d_unlearn_is_what_may_be_trained_on(classifier: Callable[..., Classifier], store: Any) -> None:
    """Sample 0 is held out, 1 has no class left, 2 is D_e-like of a subset and comes twice more, 3 is as it is. Target
    samples, and those of an earlier subset that were not purged, follow twice, without the mass of their targets."""
    (pixels, logits), network = problem(), classifier()
    allowed = torch.ones(4, 3, dtype=torch.bool)
    allowed[1] = False
    forget = torch.tensor([True, False, True, False])
    data: Any = SimpleNamespace(
        dataset=SimpleNamespace(pixels=pixels, logits=logits),
        allowed=lambda _: allowed,
        held_out=lambda _: torch.tensor([True, False, False, False]),
        subset_forget=lambda _: forget,
    )
    part = Behaviour(name="part", kind="subset", targets=(1,))
    whole = Behaviour(name="whole", kind="class", targets=(0,))
    earlier = [
        SimpleNamespace(behaviour=behaviour, samples=store.put(save_samples(pixels[number : number + 1])))
        for number, behaviour in ((1, part), (3, whole))
    ]
    inputs: Any = SimpleNamespace(
        recipe=SimpleNamespace(relearn=RelearnRecipe(repeats=2)), store=store, teacher=network,
        targets=[SimpleNamespace(train=pixels[:1], behaviour=whole)], erased_classes_after=[0],
        masked_erasures=[*earlier, SimpleNamespace(behaviour=part, samples="purged")],
    )  # fmt: skip

    trained, labels, synthetic = training_set(inputs, data, ())

    assert torch.equal(trained, pixels[[2, 3, 2, 2, 0, 0, 1, 1]])
    assert synthetic.tolist() == [True] * 4 + [False] * 4
    torch.testing.assert_close(labels[:4], logits[[2, 3, 2, 2]].softmax(1))
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert (labels[4:6] > 0).tolist() == [[False, True, True]] * 2
    assert (labels[6:] > 0).tolist() == [[False, False, True]] * 2
