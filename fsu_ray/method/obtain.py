"""The first stages of a run: a generator and its D', reused where the gate lets them, else trained and drawn anew."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from safetensors.torch import load as load_tensors

from fsu_ray.errors import StorageError
from fsu_ray.gate import refuse_generator
from fsu_ray.method import evaluate, invert
from fsu_ray.method.context import Context
from fsu_ray.method.masking import MaskedDataset
from fsu_ray.method.reading import read_generator
from fsu_ray.method.synthesize import Synthetic, starved_classes, synthesize
from fsu_ray.models.networks import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.work import GeneratorRef


class GateInputs(Protocol):
    """What the figures of D' depend on besides masks: the current version, the recipe, the classes gone as a whole."""

    @property
    def current(self) -> Classifier: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def gone(self) -> list[int]: ...


def obtain(context: Context) -> MaskedDataset:
    """D' under the masks of this run; `context.saved` learns where it came from and its figures."""
    saved = context.saved
    if saved.dataset is not None:
        digest = saved.dataset
        return context.group.together(lambda: _load(context, digest))
    begun = saved.generator is not None or saved.inversion is not None
    if context.order.generators.reuse is not None and not begun:
        found = _reuse(context, context.order.generators.reuse)
        if found is not None:
            return found
    transfer = context.order.generators.transfer
    if saved.generator is None and transfer is not None:
        saved.use, saved.generator = "transferred", transfer.weights
    elif saved.generator is None:
        _train(context)
    return _draw(context)


def _load(context: Context, digest: str) -> MaskedDataset:
    found = Synthetic.from_bytes(context.store.get(digest))
    if tuple(found.pixels.shape[1:]) != context.order.spec.shape:
        raise StorageError(f"data set {digest[:12]} does not have the shape of the model")
    return MaskedDataset(context, found, digest)


def _reuse(context: Context, offer: GeneratorRef) -> MaskedDataset | None:
    """What the registry offers, None where the gate refuses it and another one may be trained: `saved.refused`."""
    started = time.monotonic()
    context.tell("gate", 0, 1)
    found = context.group.together(lambda: _load(context, offer.dataset))
    metrics = context.group.once(lambda: figures_of(context, found, dict(offer.metrics)))
    saved, refused = context.saved, refuse_generator(metrics, context.recipe.gate)
    saved.refused = list(refused)
    context.tell("gate", 1, 1, {"agreement": metrics["agreement"], "coverage": metrics["coverage"]})
    if refused and not context.order.generators.required:
        return None
    saved.use, saved.generator, saved.dataset, saved.metrics = "reused", offer.weights, offer.dataset, metrics
    context.finish("gate", started)
    return found


def figures_of(line: GateInputs, masking: MaskedDataset, drawn: dict[str, Any]) -> dict[str, Any]:
    """The figures of D' for the current version of a line; `drawn`: acceptance and count by class."""
    drawn = {
        "acceptance": drawn.get("acceptance_by_class", drawn["acceptance"]),
        "count": drawn.get("count_by_class") or drawn["count"],
    }
    untouched = torch.ones(len(masking.dataset), dtype=torch.bool)
    for mask in masking.earlier:
        untouched &= ~mask.is_forget
    starved = [c for c in starved_classes(drawn["count"], line.recipe.synthesize) if c not in line.gone]
    return evaluate.generator_figures(
        line.current, masking.dataset, drawn, masking.allowed(), untouched, line.gone, starved
    )


def _train(context: Context) -> None:
    """Inversion of the labelling version, from the weights of an older generator where there is one."""
    started = time.monotonic()
    saved, store, recipe = context.saved, context.store, context.recipe.invert
    warm = context.order.generators.warm_start
    weights = load_tensors(store.get(warm.weights)) if warm and store.has(warm.weights) else None
    run = invert.begin(context.teacher, recipe, weights)
    if saved.inversion is not None:
        run.restore(saved.inversion)
        saved.resumed_at.append(f"invert {run.step}")
    before = saved.seconds.get("invert", 0.0)

    def keep(run: invert.Inversion) -> None:
        saved.inversion = run.state()
        saved.seconds["invert"] = before + time.monotonic() - started
        assert context.checkpoint is not None
        context.checkpoint(saved)

    generator = invert.invert(
        context.teacher,
        recipe,
        run,
        lambda step, steps, losses: context.tell("invert", step, steps, losses),
        keep if context.checkpoint else None,
        context.every,
        context.group,
    )
    saved.use = "warm_started" if weights else "trained"
    saved.generator = context.group.once(lambda: store.put(generator.to_bytes()))
    saved.seconds["invert"] = before
    context.finish("invert", started)


def _draw(context: Context) -> MaskedDataset:
    started = time.monotonic()
    saved = context.saved
    context.tell("synthesize", 0, context.recipe.synthesize.per_class)
    assert saved.generator is not None
    generator = read_generator(context.order.spec, context.store.get(saved.generator))
    generator = generator.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset, drawn = synthesize(
        context.teacher,
        generator,
        context.recipe.synthesize,
        lambda done, total, metrics: context.tell("synthesize", done, total, metrics),
        context.group,
    )
    masking = MaskedDataset(context, dataset, context.group.once(lambda: context.store.put(dataset.to_bytes())))
    saved.dataset = masking.digest
    saved.metrics = context.group.once(lambda: figures_of(context, masking, drawn))
    if context.order.generators.required:
        saved.refused = list(refuse_generator(saved.metrics, context.recipe.gate))
    context.finish("synthesize", started)
    return masking
