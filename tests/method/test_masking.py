"""Masks of a run over one D': where each comes from, and what they make of the data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fsu_ray.method.filter import Mask, extract_features, select
from fsu_ray.method.fit import predict
from fsu_ray.method.inputs import TargetSamples, save_samples
from fsu_ray.method.masking import ForgetSet, MaskedDataset, load_forget_sets
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import FilterRecipe
from fsu_ray.records import Behaviour, Digest
from fsu_ray.work import EarlierErasure, ErasureTarget

pytestmark = pytest.mark.usefixtures("one_thread")

N = 200
HERE = "digest of D'"
KNEE = FilterRecipe(policy="knee")
ALL_NEAR = FilterRecipe(policy="manual", threshold=9.0, runner_up=0.0)
WHOLE = Behaviour(name="whole", kind="class", targets=(1,))
PART = Behaviour(name="part", kind="subset", targets=(2,))


@pytest.fixture
def teacher(classifier: Callable[..., Classifier]) -> Classifier:
    """A network of three classes that sees all of them in noise."""
    return classifier(seed=2)


@pytest.fixture
def dataset(teacher: Classifier) -> Synthetic:
    """D' of `N` samples of noise with the labels of `teacher`; every tenth is held out."""
    pixels = noise(N)
    logits = predict(teacher, pixels)
    logits[:, :] += 3 * torch.eye(3)[torch.arange(N) % 3]  # all classes
    return Synthetic(pixels, logits, torch.zeros(N), logits.argmax(1), torch.arange(N) % 10 == 0)


def noise(number: int, seed: int = 0) -> Tensor:
    """Samples (number, 1, 16, 16) uint8."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 1, 16, 16), dtype=torch.uint8, generator=rng)


def erased(behaviour: Behaviour, **changes: Any) -> EarlierErasure:
    """An erasure that was made on another D', with artifacts that no store has."""
    values = {"samples": "s", "mask": "m", "probes": "p", "dataset": "another D'", "filter": KNEE, "recorded": 0.0}
    return EarlierErasure(request="r", behaviour=behaviour, **{**values, **changes})


def masked(teacher: Classifier, dataset: Synthetic, store: Any, *erasures: EarlierErasure) -> MaskedDataset:
    """D' under the masks of `erasures`."""
    return MaskedDataset(store, teacher, erasures, dataset, HERE)


def mask_of(rows: Sequence[int], behaviour: Behaviour) -> Mask:
    """A mask under which exactly `rows` of D' are D_e-like."""
    is_forget = torch.zeros(N, dtype=torch.bool)
    is_forget[list(rows)] = True
    return Mask(is_forget, behaviour.targets, behaviour.kind == "class", "leave-one-out", 0.5)


def forget_set(rows: Sequence[int], behaviour: Behaviour) -> ForgetSet:
    """A target of the run whose D_e-like samples are `rows` of D'."""
    target = TargetSamples(ErasureTarget("r", behaviour, Digest("s")), noise(1), torch.zeros(1, dtype=torch.bool))
    return ForgetSet(target, mask_of(rows, behaviour), Digest("m"))


def same(one: Mask, other: Mask) -> bool:
    rest = [dataclasses.astuple(dataclasses.replace(mask, is_forget=torch.zeros(0))) for mask in (one, other)]
    return torch.equal(one.is_forget, other.is_forget) and rest[0][1:] == rest[1][1:]


def test_a_mask_is_that_of_the_filter_on_what_the_teacher_sees(
    teacher: Classifier, dataset: Synthetic, store: Any
) -> None:
    """Features, classes and logits of D' and of the examples go to `filter.select`."""
    examples = noise(6, seed=1)
    features = extract_features(teacher, dataset.pixels), extract_features(teacher, examples)
    logits = dataset.logits, predict(teacher, examples)
    for recipe in (KNEE, FilterRecipe(), FilterRecipe(runner_up=0.9)):
        expected = select(recipe, PART, features[0], dataset.predicted, features[1], logits)
        assert same(masked(teacher, dataset, store).select(recipe, PART, examples), expected)
    unsure = select(ALL_NEAR, PART, features[0], dataset.predicted, features[1], logits)
    assert 0 < int(unsure.is_forget.sum()) < N


def test_a_mask_by_class_takes_no_pass_of_the_teacher_over_the_data_set(
    teacher: Classifier, dataset: Synthetic, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of `filter.select`, which reads the predicted classes alone."""
    nothing = torch.zeros(N, 1), torch.zeros(6, 1)
    expected = [
        select(recipe, behaviour, nothing[0], dataset.predicted, nothing[1])
        for recipe, behaviour in ((FilterRecipe(), WHOLE), (FilterRecipe(policy="class"), PART))
    ]
    monkeypatch.setattr(Classifier, "forward", None)
    found = masked(teacher, dataset, store)
    assert same(found.select(FilterRecipe(), WHOLE, noise(6)), expected[0])
    assert same(found.select(FilterRecipe(policy="class"), PART, noise(6)), expected[1])


def test_the_recorded_mask_serves_the_data_set_that_it_was_made_for(
    teacher: Classifier, dataset: Synthetic, store: Any
) -> None:
    """The target samples are not read: they may have been purged."""
    recorded = mask_of([3, 5], PART)
    erasure = erased(PART, mask=store.put(recorded.to_bytes()), dataset=HERE)
    (mask,) = masked(teacher, dataset, store, erasure).earlier
    assert same(mask, recorded)


def test_on_another_data_set_a_mask_is_rebuilt_from_the_samples_or_else_the_probes(
    teacher: Classifier, dataset: Synthetic, store: Any
) -> None:
    samples, probes = noise(6, seed=1), noise(4, seed=2)
    digests = {"samples": store.put(save_samples(samples)), "probes": store.put(save_samples(probes))}
    erasure = erased(PART, **digests)
    by_samples, by_probes = (masked(teacher, dataset, store).select(KNEE, PART, each) for each in (samples, probes))
    assert not same(by_samples, by_probes)
    assert same(masked(teacher, dataset, store, erasure).earlier[0], by_samples)
    del store[digests["samples"]]
    assert same(masked(teacher, dataset, store, erasure).earlier[0], by_probes)


@pytest.mark.parametrize("behaviour", [WHOLE, PART], ids=["class", "subset"])
def test_a_behaviour_that_the_root_has_lost_itself_masks_no_sample(
    teacher: Classifier, dataset: Synthetic, store: Any, behaviour: Behaviour
) -> None:
    """Its mask has the targets, and all samples lose them where it is a whole class."""
    (mask,) = masked(teacher, dataset, store, erased(behaviour, sealed=True, dataset=HERE)).earlier
    expected = Mask(torch.zeros(N, dtype=torch.bool), behaviour.targets, behaviour is WHOLE, "knee", None)
    assert same(mask, expected)
    assert mask.is_forget.dtype == torch.bool


def test_earlier_masks_keep_the_order_of_the_erasures(teacher: Classifier, dataset: Synthetic, store: Any) -> None:
    recorded = [mask_of([1], PART), mask_of([2], WHOLE), mask_of([3], PART)]
    erasures = [
        erased(behaviour, mask=store.put(mask.to_bytes()), dataset=HERE)
        for behaviour, mask in zip((PART, WHOLE, PART), recorded, strict=True)
    ]
    earlier = masked(teacher, dataset, store, *erasures).earlier
    assert [mask.is_forget.nonzero().flatten().tolist() for mask in earlier] == [[1], [2], [3]]


def test_subset_samples_are_those_of_all_subsets_earlier_and_now(
    teacher: Classifier, dataset: Synthetic, store: Any
) -> None:
    """The samples of a whole class are none of them."""
    recorded = [mask_of([1, 2], PART), mask_of([3, 4], WHOLE)]
    erasures = [
        erased(behaviour, mask=store.put(mask.to_bytes()), dataset=HERE)
        for behaviour, mask in zip((PART, WHOLE), recorded, strict=True)
    ]
    data = masked(teacher, dataset, store, *erasures)
    own = [forget_set([5], WHOLE), forget_set([2, 6], PART)]
    assert data.subset_forget(own).nonzero().flatten().tolist() == [1, 2, 6]
    retained = data.retained(own)
    assert (~retained).nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6], "no sample of any mask"
    assert (~data.retained()).nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_no_sample_of_a_small_subset_is_held_out(teacher: Classifier, dataset: Synthetic, store: Any) -> None:
    """A subset with 100 samples keeps its share of the held-out ones, one with fewer trains on all."""
    before = dataset.holdout.clone()
    data = masked(teacher, dataset, store)
    enough, few = (forget_set(range(number), PART) for number in (100, 99))
    assert torch.equal(data.held_out([enough]), before)
    expected = before & (torch.arange(N) >= 99)
    assert torch.equal(data.held_out([few]), expected)
    assert not torch.equal(expected, before)
    assert torch.equal(dataset.holdout, before), "D' itself is not changed"
    assert torch.equal(data.held_out([forget_set([0, 10], WHOLE)]), before)


def test_a_sample_may_have_the_classes_that_no_mask_takes_from_it(
    teacher: Classifier, dataset: Synthetic, store: Any
) -> None:
    """A whole class is taken from all, a subset's targets from its own samples, earlier and now."""
    earlier = erased(PART, mask=store.put(mask_of([7], PART).to_bytes()), dataset=HERE)
    data = masked(teacher, dataset, store, earlier)
    expected = torch.ones(N, 3, dtype=torch.bool)
    expected[7, 2] = False
    assert torch.equal(data.allowed(), expected)
    expected[:, 1] = False
    assert torch.equal(data.allowed([forget_set([9], WHOLE)]), expected)


def test_a_stored_mask_comes_back_with_its_target_and_its_digest(store: Any) -> None:
    """In the order of the targets."""
    masks = [mask_of([1, 5], PART), mask_of([2], WHOLE)]
    digests = [store.put(mask.to_bytes()) for mask in masks]
    targets = tuple(forget_set([0], behaviour).target for behaviour in (PART, WHOLE))
    loaded = load_forget_sets(SimpleNamespace(store=store, targets=targets), digests)
    assert [(each.target, each.digest) for each in loaded] == list(zip(targets, digests, strict=True))
    assert all(same(each.mask, mask) for each, mask in zip(loaded, masks, strict=True))
