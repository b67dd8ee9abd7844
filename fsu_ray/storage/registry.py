"""Which generator and D' serve which model line, and what a run must know of the line's earlier erasures."""

from __future__ import annotations

from dataclasses import dataclass

from fsu_ray.recipes import Recipe
from fsu_ray.records import Generator, Model, ModelVersion
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.serving import check_compatible, is_current, matches
from fsu_ray.work import EarlierErasure, GeneratorRef


@dataclass(frozen=True)
class GeneratorCandidates:
    """The generators that a run may use: `reuse` as it is, D' included; `warm` as the start of a new training;
    `transfer` with a D' that is drawn anew. `bound`: it must be that one."""

    reuse: GeneratorRef | None
    warm: GeneratorRef | None
    transfer: GeneratorRef | None = None
    required: bool = False


def offer(ledger: Ledger, model: Model, base: ModelVersion, root: ModelVersion, recipe: Recipe) -> GeneratorCandidates:
    """The newest generators of the model that fit its input shape and classes and are not retired.

    `reuse` also has a D' with the labels of `root` (`Ledger.models.sealed_root` of `base`) and the recipe of generator
    and D', and starved no class; whether it really serves is for the gate to say, on figures of the run. `warm` may
    have any root and recipe. The paper's form draws D' anew from each version, and so is offered nothing.
    """
    if recipe.form == "paper":
        return GeneratorCandidates(None, None)
    fitting = [
        generator
        for generator in ledger.generators.all(model.name)
        if matches(generator, model) and generator.retired is None
    ]
    reusable = [
        generator
        for generator in fitting
        if is_current(generator, root, recipe) and not generator.metrics.get("starved")
    ]
    return GeneratorCandidates(reuse=_newest(reusable), warm=_newest([each for each in fitting if each.sealed is None]))


def offer_named(
    ledger: Ledger, model: Model, root: ModelVersion, recipe: Recipe, generator: str
) -> GeneratorCandidates:
    """The generator of that id and no other, as `serving.serves` says; raises GeneratorUnfit where it cannot serve."""
    named = ledger.generators.get(generator)
    how, found = check_compatible(named, model, root, recipe), _ref(named)
    if how == "reuse":
        return GeneratorCandidates(reuse=found, warm=None, required=True)
    return GeneratorCandidates(reuse=None, warm=None, transfer=found, required=True)


def earlier_erasures(
    ledger: Ledger, model: Model, base: ModelVersion, root: ModelVersion
) -> tuple[EarlierErasure, ...]:
    """The erasures in force at `base`, oldest first, each with its mask, the D' of that mask, and its record.

    `recorded` is the share of its probes in a target class when it was erased, 0 where none were measured. Those
    that were in force when `root` was sealed are sealed: D' knows nothing of them any more.
    """
    datasets = {generator.id: generator.dataset for generator in ledger.generators.all(model.name)}
    seal = root.number if root.number != base.root else 0
    recipes = {request.id: request.recipe for request in ledger.requests.all(model.name)}
    return tuple(
        EarlierErasure(
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
        for erasure in ledger.models.erasures(model.name, base.number)
    )


def _newest(generators: list[Generator]) -> GeneratorRef | None:
    """The last of generators that are sorted by age."""
    if not generators:
        return None
    return _ref(generators[-1])


def _ref(found: Generator) -> GeneratorRef:
    return GeneratorRef(id=found.id, weights=found.weights, dataset=found.dataset, metrics=found.metrics)
