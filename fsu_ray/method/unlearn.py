"""One run, from a work order to an outcome: obtain a generator and D', filter, relearn, evaluate.

The stages run in this order in any process; Ray workers and plain scripts call the same `unlearn`. Artifacts come from
and go to a `BlobStore`, so a checkpoint holds digests (and, during the inversion, the generator and its optimiser). A
resumed run repeats at most one stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch

from fsu_ray.gate import refuse_generator
from fsu_ray.method import evaluate, generators
from fsu_ray.method.group import Group
from fsu_ray.method.inputs import RunInputs, load_classifier, load_inputs, save_samples
from fsu_ray.method.invert import Inversion
from fsu_ray.method.masking import ForgetSet, MaskedDataset, load_forget_sets, select_masks
from fsu_ray.method.relearn import relearn, training_set
from fsu_ray.records import Digest, GeneratorUse, ProgressCallback
from fsu_ray.work import BlobStore, GeneratorRef, Outcome, TargetResult, WorkOrder


@dataclass(frozen=True)
class RunState:
    """What the finished stages of a run returned, and the state of a running inversion: the content of a checkpoint.

    `use` and `generator` come from the first stage, `dataset`, `metrics` and `refused` from the gate or the synthesis,
    `masks` from the filter, `weights` from the relearning. All are None or empty before. `seconds` is the
    time of each stage, over all attempts. `resumed_at` lists where the run went on from a checkpoint.

    `dataclasses.asdict` gives plain values that `torch.load(weights_only=True)` reads; RunState(**values) restores it.
    """

    use: GeneratorUse | None = None
    generator: Digest | None = None
    dataset: Digest | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    masks: tuple[Digest, ...] = ()
    weights: Digest | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    resumed_at: tuple[str, ...] = ()
    inversion: Mapping[str, Any] | None = None


Checkpoint = Callable[[RunState], None]


def unlearn(
    order: WorkOrder,
    store: BlobStore,
    device: torch.device,
    on_progress: ProgressCallback | None = None,
    checkpoint: Checkpoint | None = None,
    state: RunState | None = None,
    every: int = 100,
    group: Group | None = None,
) -> Outcome:
    """Carry out `order`. The gate judges only the generator here; the result is judged by the caller.

    `on_progress` hears of every stage. `checkpoint` gets the state after each stage and every `every` steps of the
    inversion. A run that is given such a state goes on from it. Raises StorageError where an artifact is missing.

    The ranks of `group` call this in step, with the same arguments. They share inversion, synthesis and relearning;
    the first rank does the short work (filter, evaluation, artifacts) for all. `checkpoint` is called on all ranks,
    `on_progress` on the first.
    """
    group = group or Group()
    inputs = group.together(lambda: load_inputs(order, store, device))
    run = _Run(inputs, on_progress, checkpoint, _resumed(state or RunState()), every, group)
    masked = run.obtain()
    reason = _refusal(order, run.state.refused) or _starvation(run.state.metrics)
    forget_sets: tuple[ForgetSet, ...] = ()
    probes: list[Digest] = []
    reports: list[dict[str, Any]] = []
    if reason is None:
        forget_sets = run.filter(masked)
        probes = group.once(lambda: _store_probes(store, masked, forget_sets))
        reason = _nothing_found(forget_sets) or run.relearn(masked, forget_sets)
        if reason is None:
            reports = run.evaluate(masked, forget_sets)
    return _outcome(order, run.state, reason, forget_sets, probes, reports)


class _Run:
    """A run in progress. Each method is a stage: it calls the stage's functions, adds what they return to `state`, and
    reports progress and checkpoints."""

    def __init__(
        self,
        inputs: RunInputs,
        on_progress: ProgressCallback | None,
        checkpoint: Checkpoint | None,
        state: RunState,
        every: int,
        group: Group,
    ) -> None:
        self.inputs, self.state = inputs, state
        self._on_progress, self._checkpoint, self._every, self._group = on_progress, checkpoint, every, group
        self._seconds_before = state.seconds

    def obtain(self) -> MaskedDataset:
        """D' under the masks in force: reused if the gate lets it, else drawn from a generator that is given or
        trained."""
        state, candidates = self.state, self.inputs.order.generators
        if state.dataset is not None:
            return self._load(state.dataset)
        begun = state.generator is not None or state.inversion is not None
        if candidates.reuse is not None and not begun:
            reused = self._reuse(candidates.reuse)
            if reused is not None:
                return reused
        if state.generator is None and candidates.transfer is not None:
            self.state = replace(self.state, use="transferred", generator=candidates.transfer.weights)
        elif state.generator is None:
            self._train()
        return self._draw()

    def _load(self, dataset: str) -> MaskedDataset:
        return self._group.together(lambda: generators.load_dataset(self.inputs, dataset))

    def _reuse(self, generator: GeneratorRef) -> MaskedDataset | None:
        """The D' of an existing generator, None where the gate refuses it and another generator may be trained."""
        started = time.monotonic()
        self._tell("gate", 0, 1)
        masked = self._load(generator.dataset)
        metrics = self._group.once(lambda: generators.reused_metrics(self.inputs, generator, masked))
        refused = refuse_generator(metrics, self.inputs.recipe.gate)
        self.state = replace(self.state, refused=refused)
        self._tell("gate", 1, 1, {"agreement": metrics["agreement"], "coverage": metrics["coverage"]})
        if refused and not self.inputs.order.generators.required:
            return None
        values = {"generator": generator.weights, "dataset": generator.dataset, "metrics": metrics}
        self._finish("gate", started, use="reused", **values)
        return masked

    def _train(self) -> None:
        started = time.monotonic()
        warm, inversion = generators.warm_weights(self.inputs), self.state.inversion
        if inversion is not None:
            self.state = replace(self.state, resumed_at=(*self.state.resumed_at, f"invert {inversion['step']}"))

        def keep(run: Inversion) -> None:
            self._save(inversion=run.state(), seconds=self._seconds("invert", started))

        weights = generators.train_generator(
            self.inputs,
            warm,
            inversion,
            lambda step, steps, losses: self._tell("invert", step, steps, losses),
            keep if self._checkpoint else None,
            self._every,
            self._group,
        )
        self._finish("invert", started, use="warm_started" if warm else "trained", generator=weights)

    def _draw(self) -> MaskedDataset:
        started = time.monotonic()
        self._tell("synthesize", 0, self.inputs.recipe.synthesize.per_class)
        assert self.state.generator is not None
        masked, metrics = generators.draw_dataset(
            self.inputs,
            self.state.generator,
            lambda done, total, metrics: self._tell("synthesize", done, total, metrics),
            self._group,
        )
        refused = self.state.refused
        if self.inputs.order.generators.required:
            refused = refuse_generator(metrics, self.inputs.recipe.gate)
        self._finish("synthesize", started, dataset=masked.digest, metrics=metrics, refused=refused)
        return masked

    def filter(self, masked: MaskedDataset) -> tuple[ForgetSet, ...]:
        """The mask over D' of each target (Algorithm 3)."""
        started = time.monotonic()
        self._tell("filter", 0, 1)
        if not self.state.masks:
            self._finish("filter", started, masks=self._group.once(lambda: select_masks(self.inputs, masked)))
        forget_sets = self._group.together(lambda: load_forget_sets(self.inputs, self.state.masks))
        self._tell("filter", 1, 1, {"found": sum(int(each.mask.is_forget.sum()) for each in forget_sets)})
        return forget_sets

    def relearn(self, masked: MaskedDataset, forget_sets: Sequence[ForgetSet]) -> str | None:
        """Train the current version on D' under all masks (Algorithm 4). Returns `retention_lost` and advice where
        the training diverged: such weights are not measured."""
        if self.state.weights is not None:
            return None
        started, recipe = time.monotonic(), self.inputs.recipe.relearn
        self._tell("relearn", 0, recipe.epochs)
        child = relearn(
            self.inputs.current,
            *self._group.once(lambda: training_set(self.inputs, masked, forget_sets)),
            recipe,
            lambda epoch, epochs, losses: self._tell("relearn", epoch, epochs, losses),
            self._group,
        )
        if not all(bool(t.isfinite().all()) for t in child.parameters()):
            return "retention_lost: the relearning diverged; try a lower relearn.lr"
        self._finish("relearn", started, weights=self._group.once(lambda: self.inputs.store.put(child.to_bytes())))
        return None

    def evaluate(self, masked: MaskedDataset, forget_sets: Sequence[ForgetSet]) -> list[dict[str, Any]]:
        """A report for each target; `method.evaluate` describes the keys."""
        started = time.monotonic()
        self._tell("evaluate", 0, 1)

        def reports() -> list[dict[str, Any]]:
            inputs, weights = self.inputs, self.state.weights
            assert weights is not None
            child = load_classifier(inputs.order, inputs.store, inputs.device, weights)
            return evaluate.measure_with_test_set(inputs, masked, forget_sets, child)

        measured = self._group.once(reports)
        self._finish("evaluate", started)
        self._tell("evaluate", 1, 1, {"agreement": measured[0]["retention"]["agreement"]})
        return measured

    def _tell(self, stage: str, done: int, total: int, metrics: dict[str, float] | None = None) -> None:
        """Report progress. All ranks call this at once; the first one reports."""
        on_progress = self._on_progress
        if on_progress:
            self._group.once(lambda: on_progress(stage, done, total, metrics or {}))

    def _finish(self, stage: str, started: float, **values: Any) -> None:
        """Add what a finished stage returned to the state, and save it."""
        self._save(**values, inversion=None, seconds=self._seconds(stage, started))

    def _seconds(self, stage: str, started: float) -> dict[str, float]:
        """The seconds of all stages so far, of which `stage` began at `started` in this attempt."""
        spent = self._seconds_before.get(stage, 0.0) + time.monotonic() - started
        return {**self.state.seconds, stage: spent}

    def _save(self, **values: Any) -> None:
        self.state = replace(self.state, **values)
        if self._checkpoint:
            self._checkpoint(self.state)


def _resumed(state: RunState) -> RunState:
    """`state` with a note of the stage after which the run goes on. The inversion notes its step itself."""
    if state.inversion is not None or not state.seconds:
        return state
    return replace(state, resumed_at=(*state.resumed_at, f"after {list(state.seconds)[-1]}"))


def _refusal(order: WorkOrder, refused: Sequence[str]) -> str | None:
    """`generator_refused` with the gate's verdict, where the request names the generator: no other may serve."""
    named = order.generators.reuse or order.generators.transfer
    if not order.generators.required or not refused or named is None:
        return None
    verdict = "; ".join(refused)
    return f"generator_refused: the gate refuses {named.id} for this version: {verdict}; ask without --generator"


def _starvation(metrics: Mapping[str, Any]) -> str | None:
    """`starved_class` with the classes of which D' holds too few samples, None where there are none."""
    starved = metrics["starved"]
    if not starved:
        return None
    return (
        f"starved_class: D' holds too few samples of {starved}; "
        "try more invert.steps, a higher synthesize.entropy_threshold, or other loss weights"
    )


def _nothing_found(forget_sets: Sequence[ForgetSet]) -> str | None:
    """`nothing_found` with the first target whose mask is empty, None where there is none."""
    empty = [each.target for each in forget_sets if not bool(each.mask.is_forget.any())]
    if not empty:
        return None
    return (
        f"nothing_found: no sample of D' resembles the target samples of {empty[0].behaviour.name}; give more samples, "
        "set filter.policy to class (whole classes) or manual (with filter.threshold), or, for a subset, lower "
        "filter.runner_up or take fewer invert.steps: a long inversion draws little that the classifier is unsure of"
    )


def _store_probes(store: BlobStore, masked: MaskedDataset, forget_sets: Sequence[ForgetSet]) -> list[Digest]:
    """Store the D_e-like samples of each target, by which the erasure is measured again later: their digests."""
    return [store.put(save_samples(masked.dataset.pixels[each.mask.is_forget])) for each in forget_sets]


def _outcome(
    order: WorkOrder,
    state: RunState,
    reason: str | None,
    forget_sets: Sequence[ForgetSet],
    probes: Sequence[Digest],
    reports: Sequence[dict[str, Any]],
) -> Outcome:
    """The outcome of a run from the values of its stages; the last ones are empty where it ended early."""
    assert state.use is not None
    assert state.generator is not None
    assert state.dataset is not None
    masks = [forget_set.digest for forget_set in forget_sets]
    return Outcome(
        reason=reason,
        generator_use=state.use,
        generator_weights=state.generator,
        dataset=state.dataset,
        metrics=state.metrics,
        refused=state.refused,
        weights=state.weights,
        targets=tuple(
            TargetResult(target.request, mask, probe, report or {})
            for target, mask, probe, report in zip_longest(order.targets, masks, probes, reports)
        ),
        seconds={stage: round(seconds, 2) for stage, seconds in state.seconds.items()},
        resumed=state.resumed_at,
    )
