"""Planning a run: where a model stands, which generators may serve it, and the work order of a request.

Functions on a connection, so that a plan is read in one snapshot of the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from fsu_ray.errors import GeneratorUnfit
from fsu_ray.recipes import Recipe
from fsu_ray.records import Digest, Generator, Model, ModelVersion, Request
from fsu_ray.storage import claims, rows
from fsu_ray.storage.schema import erasures, generators, requests, seals
from fsu_ray.work import EarlierErasure, ErasureTarget, GeneratorCandidates, GeneratorRef, WorkOrder


@dataclass(frozen=True)
class LineageState:
    """Where a model stands: `base` is the version that a run starts from, `root` the version that labels D', and
    `earlier_erasures` are in force at `base`, oldest first."""

    model: Model
    base: ModelVersion
    root: ModelVersion
    earlier_erasures: tuple[EarlierErasure, ...]

    def order(
        self,
        targets: tuple[ErasureTarget, ...],
        recipe: Recipe,
        generators: GeneratorCandidates | None = None,
        test_set: str | None = None,
    ) -> WorkOrder:
        """The work order to erase `targets` from `base`, with no generator to reuse unless `generators` names one."""
        return WorkOrder(
            spec=self.model.spec,
            root_weights=self.root.weights,
            current_weights=self.base.weights,
            targets=targets,
            recipe=recipe,
            earlier_erasures=self.earlier_erasures,
            generators=generators or GeneratorCandidates(),
            test_set=test_set,
        )


@dataclass(frozen=True)
class Plan:
    """A claimed request on top of a state of its model, and the work order of its run."""

    lineage: LineageState
    order: WorkOrder


def plan(connection: sa.Connection, request: Request) -> Plan:
    """The plan of a claimed request and of the requests of its batch.

    Raises GeneratorUnfit where the generator that the request names can no longer serve it.
    """
    state = lineage(connection, request.model)
    if request.generator is None:
        candidates = find_candidates(connection, state.model, state.root, request.recipe)
    else:
        candidates = named_candidate(connection, state.model, state.root, request.recipe, request.generator)
    members = (request, *claims.batch_members(connection, request))
    targets = tuple(ErasureTarget(member.id, member.behaviour, member.samples) for member in members)
    return Plan(state, state.order(targets, request.recipe, candidates, state.model.test_set))


def lineage(connection: sa.Connection, name: str, number: int | None = None) -> LineageState:
    """The state of the model `name` at version `number`, None for the latest; raises NotFound."""
    model = rows.fetch_model(connection, name)
    base = rows.fetch_version(connection, model, number)
    root = rows.fetch_sealed_root(connection, model, base)
    return LineageState(model, base, root, earlier_erasures(connection, model, base, root))


def find_candidates(connection: sa.Connection, model: Model, root: ModelVersion, recipe: Recipe) -> GeneratorCandidates:
    """The newest generators of `model` that fit its input shape and classes and are not retired.

    `reuse` also has a D' with the labels of `root` and the recipe of generator and D', and starved no class. The gate
    of the run decides whether it serves, by metrics for the current version. `warm` may have any root and recipe. The
    paper's form draws D' anew from each version, so it gets no candidates.
    """
    if recipe.form == "paper":
        return GeneratorCandidates()
    query = rows.GENERATORS.where(generators.c.model_id == model.id, rows.NOT_RETIRED)
    in_use = connection.execute(query.order_by(*rows.oldest_first(generators))).mappings()
    fitting = [generator for generator in map(rows.to_generator, in_use) if matches(generator, model)]
    reusable = [
        generator
        for generator in fitting
        if is_current(generator, root, recipe) and not generator.metrics.get("starved")
    ]
    unsealed = [generator for generator in fitting if generator.sealed is None]
    return GeneratorCandidates(reuse=_newest(reusable), warm=_newest(unsealed))


def named_candidate(
    connection: sa.Connection, model: Model, root: ModelVersion, recipe: Recipe, generator_id: str
) -> GeneratorCandidates:
    """The generator with this id and no other; raises NotFound, and GeneratorUnfit where it cannot serve."""
    generator = rows.fetch_generator(connection, generator_id)
    if check_compatible(generator, model, root, recipe) == "reuse":
        return GeneratorCandidates(reuse=_ref(generator), required=True)
    return GeneratorCandidates(transfer=_ref(generator), required=True)


def matches(generator: Generator, model: Model) -> bool:
    """Whether a generator draws what the model takes: its input shape and its classes."""
    drawn, taken = generator.spec, model.spec
    return (drawn.shape, drawn.classes) == (taken.shape, taken.classes)


def is_current(generator: Generator, root: ModelVersion, recipe: Recipe) -> bool:
    """Whether the D' of a generator of this model is what `recipe` would draw from it and `root` would label, so that
    it is reused as it is. The paper's form draws D' anew from each version."""
    labelled = (generator.sealed or generator.root) == root.number
    return recipe.form != "paper" and labelled and generator.recipe_digest == recipe.generator_digest


def check_compatible(
    generator: Generator, model: Model, root: ModelVersion, recipe: Recipe
) -> Literal["reuse", "transfer"]:
    """How `generator` would serve a request of `model` whose D' is labelled by `root`.

    `reuse`: with its D' as it is. `transfer`: with its weights alone, from which D' is drawn and labelled anew. That
    serves for a generator of another model, and for a D' of an older root or another recipe. Raises GeneratorUnfit
    where the generator is retired, draws another shape or other classes than the model takes, or is sealed (its
    weights are destroyed) and its D' does not serve.
    """
    others = "`fsu generator list` shows those in use"
    if generator.retired is not None:
        raise GeneratorUnfit(f"generator {generator.id} is retired ({generator.retired}); {others}")
    if not matches(generator, model):
        drawn, taken = (
            f"{spec.classes} classes of {spec.channels}x{spec.height}x{spec.width}"
            for spec in (generator.spec, model.spec)
        )
        raise GeneratorUnfit(
            f"generator {generator.id} of {generator.model!r} draws {drawn}, {model.name!r} takes {taken}; name one "
            "that draws the same"
        )
    if generator.model == model.name and is_current(generator, root, recipe):
        return "reuse"
    if generator.sealed is not None:
        raise GeneratorUnfit(
            f"generator {generator.id} of {generator.model!r} is sealed, its weights are destroyed, and its D' cannot "
            f"serve this request; {others}"
        )
    return "transfer"


def earlier_erasures(
    connection: sa.Connection, model: Model, base: ModelVersion, root: ModelVersion
) -> tuple[EarlierErasure, ...]:
    """The erasures in force at `base`, oldest first, each with its mask, the D' of that mask, and its record.

    `recorded` is 0 where no probes were measured. Erasures that were in force when `root` was sealed are marked as
    sealed: D' holds no sample of them any more.
    """
    in_force = rows.fetch_erasures(connection, model, base.number)
    if not in_force:
        return ()
    drawn = sa.select(generators.c.id, sa.func.coalesce(seals.c.dataset, generators.c.dataset))
    drawn = drawn.outerjoin(seals, seals.c.generator_id == generators.c.id).where(generators.c.model_id == model.id)
    datasets = {generator: Digest(dataset) for generator, dataset in connection.execute(drawn)}
    erased = sa.select(erasures.c.request_id).where(erasures.c.model_id == model.id)
    asked = sa.select(requests.c.id, requests.c.recipe).where(requests.c.id.in_(erased))
    recipes = {row.id: Recipe.model_validate(row.recipe) for row in connection.execute(asked)}
    seal = root.number if root.number != base.root else 0
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
        for erasure in in_force
    )


def _newest(generators: list[Generator]) -> GeneratorRef | None:
    """The last of `generators`, which are sorted by age."""
    return _ref(generators[-1]) if generators else None


def _ref(generator: Generator) -> GeneratorRef:
    return GeneratorRef(generator.id, generator.weights, generator.dataset, generator.metrics)
