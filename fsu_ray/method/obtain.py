"""The first stages of a run: a generator and its D', reused where the gate lets them, else trained and drawn anew."""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fsu_ray.errors import StorageError
from fsu_ray.gate import refuse_generator
from fsu_ray.method import evaluate, invert
from fsu_ray.method.context import Context
from fsu_ray.method.masking import Masking
from fsu_ray.method.networks import Generator
from fsu_ray.method.synthesize import Synthetic, starved_classes, synthesize
from fsu_ray.work import GeneratorRef


def obtain(context: Context) -> Masking:
    """D' under the masks of this run; `context.saved` learns where it came from and its figures."""
    saved = context.saved
    if saved.dataset is not None:
        digest = saved.dataset
        return context.group.together(lambda: _load(context, digest))
    begun = saved.generator is not None or saved.inversion is not None
    if context.order.reuse is not None and not begun:
        found = _reuse(context, context.order.reuse)
        if found is not None:
            return found
    if saved.generator is None:
        _train(context)
    return _draw(context)


def _load(context: Context, digest: str) -> Masking:
    found = Synthetic.from_bytes(context.store.get(digest))
    if tuple(found.pixels.shape[1:]) != context.order.spec.shape:
        raise StorageError(f"data set {digest[:12]} does not have the shape of the model")
    return Masking(context, found, digest)


def _reuse(context: Context, offer: GeneratorRef) -> Masking | None:
    """What the registry offers, None where the gate refuses it."""
    started = time.monotonic()
    context.tell("gate", 0, 1)
    found = context.group.together(lambda: _load(context, offer.dataset))
    figures = context.group.once(lambda: _figures(context, found, dict(offer.figures)))
    refused = refuse_generator(figures, context.recipe.gate)
    saved = context.saved
    saved.refused = list(refused)
    context.tell("gate", 1, 1, {"agreement": figures["agreement"], "coverage": figures["coverage"]})
    if refused:
        return None
    saved.use, saved.generator, saved.dataset, saved.figures = "reused", offer.weights, offer.dataset, figures
    context.finish("gate", started)
    return found


def _figures(context: Context, masking: Masking, drawn: dict[str, Any]) -> dict[str, Any]:
    """The figures of D' for the current version; `drawn`: acceptance and count by class."""
    drawn = {
        "acceptance": drawn.get("acceptance_by_class", drawn["acceptance"]),
        "count": drawn.get("count_by_class") or drawn["count"],
    }
    untouched = torch.ones(len(masking.dataset), dtype=torch.bool)
    for mask in masking.earlier:
        untouched &= ~mask.like
    starved = [c for c in starved_classes(drawn["count"], context.recipe.synthesize) if c not in context.gone]
    return evaluate.generator_figures(
        context.current, masking.dataset, drawn, masking.allowed(), untouched, context.gone, starved
    )


def _train(context: Context) -> None:
    """Inversion of the labelling version, from the weights of an older generator where there is one."""
    started = time.monotonic()
    saved, store, recipe = context.saved, context.store, context.recipe.invert
    warm = context.order.warm or context.order.reuse
    weights = load_tensors(store.get(warm.weights)) if warm and store.has(warm.weights) else None
    run = invert.begin(context.labeller, recipe, weights)
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
        context.labeller,
        recipe,
        run,
        lambda step, steps, losses: context.tell("invert", step, steps, losses),
        keep if context.checkpoint else None,
        context.every,
        context.group,
    )
    saved.use = "warm_started" if weights else "trained"
    tensors = {name: t.detach().cpu().contiguous() for name, t in generator.state_dict().items()}
    saved.generator = context.group.once(lambda: store.put(save_tensors(tensors)))
    saved.seconds["invert"] = before
    context.finish("invert", started)


def _draw(context: Context) -> Masking:
    started = time.monotonic()
    saved, recipe = context.saved, context.recipe.invert
    context.tell("synthesize", 0, context.recipe.synthesize.per_class)
    assert saved.generator is not None
    generator = Generator(context.order.spec, recipe.width, recipe.latent)
    generator.load_state_dict(load_tensors(context.store.get(saved.generator)))
    generator = generator.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset, drawn = synthesize(
        context.labeller,
        generator,
        context.recipe.synthesize,
        lambda done, total, figures: context.tell("synthesize", done, total, figures),
        context.group,
    )
    masking = Masking(context, dataset, context.group.once(lambda: context.store.put(dataset.to_bytes())))
    saved.dataset = masking.digest
    saved.figures = context.group.once(lambda: _figures(context, masking, drawn))
    context.finish("synthesize", started)
    return masking
