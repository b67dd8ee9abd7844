"""Which generator and D' serve which model line, and what a run must know of the line's earlier erasures."""

from __future__ import annotations

from dataclasses import dataclass

from fsu_ray.recipes import Recipe
from fsu_ray.records import Generator, Model, ModelVersion
from fsu_ray.storage.ledger import Ledger
from fsu_ray.work import GeneratorRef, PriorErasure


@dataclass(frozen=True)
class Offer:
    """The generators that a run may use: `reuse` as it is, D' included; `warm` as the start of a new training."""

    reuse: GeneratorRef | None
    warm: GeneratorRef | None


def offer(ledger: Ledger, model: Model, base: ModelVersion, root: ModelVersion, recipe: Recipe) -> Offer:
    """The newest generators of the model that fit its input shape and classes and are not retired.

    `reuse` also has a D' with the labels of `root` (`Ledger.sealed_root` of `base`) and the recipe of generator and
    D', and starved no class; whether it really serves is for the gate to say, on figures of the run. `warm` may
    have any root and recipe. The paper's form draws D' anew from each version, and so is offered nothing.
    """
    if recipe.form == "paper":
        return Offer(None, None)
    fitting = [
        generator
        for generator in ledger.generators(model.name)
        if (generator.spec.shape, generator.spec.classes) == (model.spec.shape, model.spec.classes)
        and generator.retired is None
    ]
    reusable = [
        generator
        for generator in fitting
        if (generator.sealed or generator.root) == root.number
        and generator.recipe_digest == recipe.generator_digest
        and not generator.figures.get("starved")
    ]
    return Offer(reuse=_newest(reusable), warm=_newest([each for each in fitting if each.sealed is None]))


def priors(ledger: Ledger, model: Model, base: ModelVersion, root: ModelVersion) -> tuple[PriorErasure, ...]:
    """The erasures in force at `base`, oldest first, each with its mask, the D' of that mask, and its record.

    `recorded` is the share of its probes in a target class when it was erased, 0 where none were measured. Those
    that were in force when `root` was sealed are sealed: D' knows nothing of them any more.
    """
    datasets = {generator.id: generator.dataset for generator in ledger.generators(model.name)}
    seal = root.number if root.number != base.root else 0
    recipes = {request.id: request.recipe for request in ledger.requests(model.name)}
    return tuple(
        PriorErasure(
            request=erasure.request,
            behaviour=erasure.behaviour,
            filter=recipes[erasure.request].filter,
            samples=erasure.samples,
            mask=erasure.mask,
            probes=erasure.probes,
            dataset=datasets[erasure.generator],
            recorded=erasure.report["forgetting"]["probes_in_target"] or 0.0,
            sealed=erasure.version <= seal,
        )
        for erasure in ledger.erasures(model.name, base.number)
    )


def _newest(generators: list[Generator]) -> GeneratorRef | None:
    """The last of generators that are sorted by age."""
    if not generators:
        return None
    newest = generators[-1]
    return GeneratorRef(id=newest.id, weights=newest.weights, dataset=newest.dataset, figures=newest.figures)
