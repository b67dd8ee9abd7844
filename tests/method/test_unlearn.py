"""The stages in order: reuse, refusal, warm start, named outcomes, resuming, the paper's form."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import pytest
import torch

from fsu_ray.method.datasets import draw
from fsu_ray.method.filter import Mask
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.method.unlearn import RunState, unlearn
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, ModelSpec
from fsu_ray.work import EarlierErasure, ErasureTarget, GeneratorCandidates, GeneratorRef, Outcome, WorkOrder

CPU = torch.device("cpu")
EVERY = {"policy": "manual", "threshold": 1.0, "runner_up": 0.0}  # all of D' that gets a target class


def changed(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    """`recipe` with some values of some parts changed."""
    return Recipe.model_validate(
        recipe.model_dump() | {k: getattr(recipe, k).model_dump() | v for k, v in parts.items()}
    )


def order_for(trained: Any, store: Any, recipe: Recipe, target: int = 8, count: int = 8, **more: Any) -> WorkOrder:
    """A request to erase a class of the digits."""
    weights = store.put(trained.weights)
    samples = store.put(save_samples(trained.train.pixels[draw(trained.train, [target], count, 0)]))
    behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
    targets = (ErasureTarget(f"r-{target}", more.pop("behaviour", behaviour), samples),)
    terms = {"root_weights": weights, "current_weights": weights, "targets": targets}
    return WorkOrder(spec=trained.spec, recipe=recipe, **(terms | more))


def reuse(outcome: Outcome) -> GeneratorCandidates:
    """The generator and D' of an earlier run, on offer."""
    return GeneratorCandidates(GeneratorRef("g-1", outcome.generator_weights, outcome.dataset, outcome.metrics))


def mask_of(outcome: Outcome, store: Any) -> Mask:
    return Mask.from_bytes(store.get(outcome.targets[0].mask or ""))


def erased_earlier(order: WorkOrder, outcome: Outcome) -> EarlierErasure:
    (target,), (result,) = order.targets, outcome.targets
    assert result.mask
    assert result.probes
    share, recipe = result.report["forgetting"]["probes_in_target"], order.recipe.filter
    return EarlierErasure(
        target.request, target.behaviour, recipe, target.samples, result.mask, result.probes, outcome.dataset, share
    )


def test_a_second_request_reuses_generator_and_data_set(trained: Any, store: Any, quick: Recipe) -> None:
    """The second erasure masks the first one's D', trains the classifier alone, and measures the first one again."""
    first = order_for(trained, store, quick)
    one = unlearn(first, store, CPU)
    assert (one.reason, one.generator_use) == (None, "trained")
    assert one.targets[0].report["forgetting"]["samples_held_out"] == 0
    second = order_for(
        trained,
        store,
        quick,
        3,
        current_weights=one.weights,
        earlier_erasures=(erased_earlier(first, one),),
        generators=reuse(one),
    )
    two = unlearn(second, store, CPU)
    assert (two.generator_use, two.dataset, two.generator_weights) == ("reused", one.dataset, one.generator_weights)
    assert set(two.seconds) == {"gate", "filter", "relearn", "evaluate"}
    assert [e["behaviour"] for e in two.targets[0].report["earlier"]] == ["class-8"]
    assert two.targets[0].report["retention"]["by_class"][8] is None


@pytest.mark.parametrize("kind", ["class", "subset"])
def test_the_few_samples_come_in_as_often_as_asked(
    trained: Any, store: Any, quick: Recipe, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The given samples come in `repeats` times, a subset's D_e-like samples that often again, an earlier subset's
    too. Nothing that is given keeps a target label, and what is of D' is told from what is given."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def learn(parent: Classifier, *data: Any) -> Classifier:
        seen.append(data[:3])
        return parent

    monkeypatch.setattr("fsu_ray.method.unlearn.relearn", learn)
    recipe = changed(quick, relearn={"repeats": 3}, synthesize={"holdout": 0.5, "per_class": 15}, filter=EVERY)
    behaviour = Behaviour(name="b", kind=kind, targets=(8,))  # type: ignore[arg-type]
    order = order_for(trained, store, recipe, behaviour=behaviour)
    first = unlearn(order, store, CPU)
    dataset, mask = Synthetic.from_bytes(store.get(first.dataset)), mask_of(first, store)
    assert (mask.is_forget & dataset.holdout).any()
    trained_on = ~dataset.holdout | mask.is_forget if kind == "subset" else ~dataset.holdout
    usable, is_forget = int(trained_on.sum()), int(mask.is_forget.sum())
    again = 3 * is_forget if kind == "subset" else 0
    pixels, targets, synthetic = seen[0]
    assert len(pixels) == len(targets) == usable + again + 3 * 8
    assert float(targets[usable:, 8].max()) == 0
    assert synthetic.tolist() == [True] * (usable + again) + [False] * 3 * 8

    seen_most = int(torch.bincount(dataset.predicted[dataset.predicted != 8]).argmax())  # so small a D' lacks classes
    later = order_for(
        trained, store, recipe, seen_most, earlier_erasures=(erased_earlier(order, first),), generators=reuse(first)
    )
    second = unlearn(later, store, CPU)
    assert second.reason is None, second.reason
    earlier = 3 * 8 if kind == "subset" else 0
    assert len(seen[1][0]) == usable + again + earlier + 3 * 8


@pytest.mark.parametrize("fewest", [1000, 1])
def test_a_subset_with_few_probes_spares_none(
    trained: Any, store: Any, quick: Recipe, monkeypatch: pytest.MonkeyPatch, fewest: int
) -> None:
    """Under `FEWEST_PROBES` all D_e-like samples of a subset are trained on, and the report says so."""
    monkeypatch.setattr("fsu_ray.method.masking.FEWEST_PROBES", fewest)
    recipe = changed(quick, relearn={"epochs": 1}, synthesize={"holdout": 0.5}, filter=EVERY)
    behaviour = Behaviour(name="b", kind="subset", targets=(8,))
    found = unlearn(order_for(trained, store, recipe, count=20, behaviour=behaviour), store, CPU)
    holdout = Synthetic.from_bytes(store.get(found.dataset)).holdout
    is_forget = mask_of(found, store).is_forget
    forgetting = found.targets[0].report["forgetting"]
    assert forgetting["probes_held_out"] == (0 if fewest == 1000 else int((is_forget & holdout).sum()))
    assert (forgetting["probes_held_out_in_target"] is None) == (fewest == 1000)


@pytest.mark.slow
def test_same_order_same_digests(trained: Any, store: Any, quick: Recipe) -> None:
    """Same recipe, same seed: the same weights, D' and mask to the last bit; another seed gives others."""
    one, two = (unlearn(order_for(trained, store, quick), store, CPU) for _ in range(2))
    assert (one.weights, one.dataset, one.targets) == (two.weights, two.dataset, two.targets)
    other = unlearn(order_for(trained, store, changed(quick, invert={"seed": 1})), store, CPU)
    assert other.dataset != one.dataset


def test_a_refused_generator_is_trained_anew_from_its_weights(trained: Any, store: Any, quick: Recipe) -> None:
    """When the gate refuses what the registry offers, the run goes on with a warm start and says why."""
    one = unlearn(order_for(trained, store, quick), store, CPU)
    strict = changed(quick, gate={"bn_distance_max": 0.0})
    two = unlearn(order_for(trained, store, strict, 3, generators=reuse(one)), store, CPU)
    assert two.generator_use == "warm_started"
    assert "BN distance" in two.refused[0]
    assert two.dataset != one.dataset


def test_masks_of_earlier_erasures_are_rebuilt_on_a_new_data_set(trained: Any, store: Any, quick: Recipe) -> None:
    """On a new D' an earlier subset's mask comes from its samples, and from its probes once they are purged."""
    recipe = changed(quick, filter={"runner_up": 0.0}, relearn={"epochs": 1})
    odd = Behaviour(name="odd", kind="subset", targets=(8,))
    first = order_for(trained, store, recipe, count=20, behaviour=odd)
    one = unlearn(first, store, CPU)
    assert one.reason is None, one.reason
    fresh = changed(recipe, synthesize={"seed": 5})
    purged = type(store)(store)
    del purged[first.targets[0].samples]
    second = order_for(
        trained,
        store,
        fresh,
        3,
        current_weights=one.weights,
        earlier_erasures=(erased_earlier(first, one),),
        generators=GeneratorCandidates(warm=reuse(one).reuse),
    )
    purged.put(save_samples(trained.train.pixels[draw(trained.train, [3], 8, 0)]))
    for place in (store, purged):
        two = unlearn(second, place, CPU)
        assert two.reason is None
        assert two.dataset != one.dataset


def test_nothing_found_is_an_outcome(trained: Any, store: Any, quick: Recipe) -> None:
    """A filter that finds nothing ends the run with advice, without a relearning."""
    tight = changed(quick, filter={"policy": "manual", "threshold": 1e-9})
    outcome = unlearn(order_for(trained, store, tight), store, CPU)
    assert outcome.reason is not None
    assert outcome.reason.startswith("nothing_found: ")
    assert "relearn" not in outcome.seconds
    assert outcome.weights is None


def test_a_starved_class_is_an_outcome(trained: Any, store: Any, quick: Recipe) -> None:
    """A generator that cannot draw every class ends the run with the names of the starved ones."""
    poor = changed(quick, invert={"steps": 1}, synthesize={"starved_below": 0.5, "max_draws": 1})
    outcome = unlearn(order_for(trained, store, poor), store, CPU)
    assert outcome.reason is not None
    assert outcome.reason.startswith("starved_class: ")
    assert outcome.metrics["starved"]


RESUMED_AT = ("invert 10", "invert 20", *(f"after {stage}" for stage in ("invert", "synthesize", "filter", "relearn")))
SLOW = pytest.mark.slow


def through_a_file(state: RunState) -> RunState:
    """A state as a checkpoint's file gives it back."""
    file = io.BytesIO()
    torch.save(asdict(state), file)
    file.seek(0)
    return RunState(**torch.load(file, weights_only=True))


@pytest.mark.parametrize("stop", [1, *(pytest.param(stop, marks=SLOW) for stop in range(2, len(RESUMED_AT) + 1))])
def test_a_run_cut_off_at_any_checkpoint_ends_as_an_undisturbed_one(
    trained: Any, store: Any, quick: Recipe, stop: int
) -> None:
    """Resuming from each checkpoint (two in the inversion, one a stage) gives the same weights and mask."""

    class CutOff(Exception):
        pass

    whole = unlearn(order_for(trained, store, quick), store, CPU)
    kept: list[RunState] = []

    def keep(saved: RunState) -> None:
        kept.append(through_a_file(saved))
        if len(kept) == stop:
            raise CutOff

    with pytest.raises(CutOff):
        unlearn(order_for(trained, store, quick), store, CPU, checkpoint=keep, every=10)
    resumed = unlearn(order_for(trained, store, quick), store, CPU, state=kept[-1], every=10)
    assert (resumed.weights, resumed.targets, resumed.dataset) == (whole.weights, whole.targets, whole.dataset)
    assert (resumed.generator_use, resumed.resumed) == ("trained", (RESUMED_AT[stop - 1],))


def test_samples_are_held_out_from_ten_on(trained: Any, store: Any, quick: Recipe) -> None:
    """Of ten samples two are only measured on; of nine none, and the report says so."""
    for count, held in ((10, 2), (9, 0)):
        outcome = unlearn(order_for(trained, store, changed(quick, relearn={"epochs": 1}), count=count), store, CPU)
        assert outcome.targets[0].report["forgetting"]["samples_held_out"] == held
        assert outcome.targets[0].report["forgetting"]["samples_given"] == count


@pytest.mark.slow
def test_the_papers_form_labels_with_the_current_version(trained: Any, store: Any, quick: Recipe) -> None:
    """`form = paper`: D' is drawn and labelled by the current version and holds no other mask."""
    quick = changed(quick, invert={"steps": 60})
    paper = Recipe.model_validate(quick.model_dump() | {"form": "paper"})
    first = order_for(trained, store, quick)
    one = unlearn(first, store, CPU)
    second = order_for(
        trained, store, paper, 3, current_weights=one.weights, earlier_erasures=(erased_earlier(first, one),)
    )
    two = unlearn(second, store, CPU)
    assert two.reason is None
    assert two.generator_use == "trained"
    dataset = Synthetic.from_bytes(store.get(two.dataset))
    current = Classifier.from_bytes(trained.spec, store.get(one.weights or ""))
    with torch.no_grad():
        expected = current(dataset.pixels[:20].float() / 255)
    torch.testing.assert_close(dataset.logits[:20], expected, rtol=1e-3, atol=1e-3)
    assert int(mask_of(two, store).is_forget.sum()) > 0


DEEP = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("torchvision:resnet18", "resnet50")]


@pytest.mark.parametrize("arch", ["preactresnet18:4", *DEEP])
def test_any_network_goes_the_whole_way(store: Any, quick: Recipe, arch: str) -> None:
    """Other networks, three channels: a few steps of every stage."""
    size = 16 if arch == "resnet50" else 32  # torch takes its time over 53 layers
    spec = ModelSpec(arch=arch, channels=3, height=size, width=size, classes=3, mean=(0.5,), std=(0.25,))
    torch.manual_seed(0)
    weights = store.put(Classifier(spec).to_bytes())
    samples = store.put(save_samples(torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)))
    recipe = changed(
        quick,
        invert={"steps": 2, "batch": 6, "width": 2, "precision": "float32"},
        synthesize={"per_class": 4, "max_draws": 70, "entropy_threshold": 5.0},
        relearn={"epochs": 1, "batch": 8},
    )

    def erase(target: int, **more: Any) -> Outcome:
        one = Behaviour(name="one", kind="class", targets=(target,))
        return unlearn(
            WorkOrder(spec, weights, weights, (ErasureTarget("r", one, samples),), recipe, **more), store, CPU
        )

    found = erase(0)  # an untrained network sees one class in all that such a generator draws: this shows which one
    assert found.dataset
    seen = int(Synthetic.from_bytes(store.get(found.dataset)).predicted.bincount().argmax())
    outcome = erase(seen, generators=reuse(found))
    assert {"invert", "synthesize"} <= set(found.seconds)
    assert {"filter", "relearn", "evaluate"} <= set(outcome.seconds)
    assert outcome.reason is None
    assert outcome.targets[0].report["forgetting"]["probes"] > 0
    assert outcome.weights not in (None, weights)


def test_a_test_set_that_is_not_where_the_run_is(trained: Any, store: Any, quick: Recipe) -> None:
    """Nothing hangs on it: the run ends well, and its report says what was not measured."""
    outcome = unlearn(order_for(trained, store, quick, 8, test_set="/no/such/folder"), store, CPU)
    assert outcome.reason is None
    assert outcome.targets[0].report["test"] is None
    assert "cannot be read" in outcome.targets[0].report["test_missing"]
