"""Recipes: presets, changes to them, and recipes that a search has found for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsu_ray.config import change_recipe, differences, make_recipe, parse_change
from fsu_ray.errors import InvalidSamples, TransitionRefused, UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import OPERATOR, Behaviour, Kind, ProgressCallback, SearchedRecipe
from fsu_ray.service.stores import Stores
from fsu_ray.work import ErasureTarget, WorkOrder

if TYPE_CHECKING:
    from fsu_ray.search import SearchResult

Change = str | dict[str, Any]
"""A change to a recipe: `"invert.steps=300"`, or `{"invert": {"steps": 300}}`."""


@dataclass(frozen=True)
class ResolvedRecipe:
    """The recipe that a request gets, and where it comes from: a `search` of its model or else a `preset`.

    `named`: the caller named a preset or changed a value. `changed`: the caller changed a value. `ignored_settings`
    are keys of the [recipe] table of fsu.toml for which a searched recipe has other values.
    """

    recipe: Recipe
    search: SearchedRecipe | None
    preset: str | None
    named: bool
    changed: bool
    ignored_settings: tuple[str, ...] = ()


class Recipes:
    """`service.recipes`."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def preset(self, name: str = "default", changes: Sequence[Change] = ()) -> Recipe:
        """The preset `name`, with the [recipe] table of fsu.toml and then `changes` laid over it; raises InvalidConfig
        for an unknown preset, key or value."""
        return make_recipe(name, [self._stores.settings.recipe, *_parsed(changes)])

    def resolve(
        self, model: str, kind: Kind, preset: str | None = None, changes: Sequence[Change] = ()
    ) -> ResolvedRecipe:
        """The recipe of a request for `model`: `preset` where one is named, else the recipe that a search found for
        requests of this kind, else the preset `default`. `changes` lie on top.

        The [recipe] table of fsu.toml applies to presets only. A searched recipe is used as it was measured: it
        already holds the table's values at the time of the search, and later values are ignored. Raises NotFound,
        InvalidConfig for an unknown preset or value, UserError for an unknown kind.
        """
        changes = _parsed(changes)
        named, changed = preset is not None or bool(changes), bool(changes)
        search = self._stores.ledger.recipes.in_force(model, kind) if preset is None else None
        if search is None or search.recipe is None:
            recipe = self.preset(preset or "default", changes)
            return ResolvedRecipe(recipe, None, preset or "default", named, changed)
        recipe = change_recipe(search.recipe, changes)
        ignored = tuple(differences(recipe, self._stores.settings.recipe))
        return ResolvedRecipe(recipe, search, None, named, changed, ignored)

    def differences_from_default(self, recipe: Recipe) -> dict[str, Any]:
        """The values of `recipe` that differ from the preset `default`, by keys such as `invert.steps`."""
        return differences(self.preset(), recipe.model_dump(mode="json"))

    def all(self, model: str) -> list[SearchedRecipe]:
        """The recipes that searches have found for a model, and the resets between them, oldest first; raises
        NotFound."""
        return self._stores.ledger.recipes.all(model)

    def reset(self, model: str, kind: Kind, actor: str = OPERATOR) -> SearchedRecipe:
        """Have later requests of this kind take a preset again; raises NotFound, and UserError also where they
        already do."""
        return self._stores.ledger.recipes.reset(model, kind, actor)

    def search(
        self,
        model: str,
        *,
        request: str | None = None,
        behaviour: Behaviour | None = None,
        samples: str | Path | None = None,
        preset: str | None = None,
        changes: Sequence[Change] = (),
        ranges: Sequence[str] = (),
        trials: int = 16,
        optuna: bool = False,
        seed: int = 0,
        actor: str = OPERATOR,
        cpus: int | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> tuple[SearchResult, SearchedRecipe | None]:
        """Search on Ray for a better recipe to erase a behaviour; returns the result and the record of it.

        The behaviour is that of `request`, which has not ended, or `behaviour` with its `samples`. The search begins
        at the recipe that `resolve` gives for `preset` and `changes`, and draws `trials` recipes around it, within
        `ranges` such as `relearn.lr=1e-4:1e-2`. A recipe that is better is recorded for later requests of this kind;
        without one the record is None. The same call continues an interrupted search. Raises NotFound, UserError and
        its kinds, TransitionRefused for a request that has ended, RunFailed.
        """
        from fsu_ray.search import SearchOptions, search
        from fsu_ray.search_space import around, narrowed
        from fsu_ray.service.running import on_ray
        from fsu_ray.storage.artifacts import locate
        from fsu_ray.storage.database import check_actor

        check_actor(actor)
        target = self._target(model, request, behaviour, samples)
        kind = target.behaviour.kind
        begin = self.resolve(model, kind, preset, changes).recipe
        space = narrowed(around(begin, kind), tuple(ranges))
        order = self.search_order(model, target, begin)
        options = SearchOptions(space, trials, optuna, seed)
        with on_ray(self._stores, cpus=cpus, workers=1):
            runs = locate(self._stores.settings.runs)
            result = search(order, self._stores.artifacts, runs, options, on_progress)
        if not result.better:
            return result, None
        known = self._stores.ledger.recipes.in_force(model, kind)
        if known is not None and known.evidence.get("name") == result.evidence["name"]:
            return result, known  # this search has been recorded before
        return result, self._stores.ledger.recipes.keep(
            model, kind, result.recipe, result.score, result.evidence, actor
        )

    def search_order(self, model: str, target: ErasureTarget, recipe: Recipe) -> WorkOrder:
        """The work order of a search that begins at `recipe`, on the latest version; raises NotFound, and UserError
        for a target or a recipe that cannot be searched."""
        from fsu_ray.method.inputs import load_samples

        ledger = self._stores.ledger
        ledger.requests.check_behaviour(model, target.behaviour)
        if recipe.form == "paper":
            raise UserError("a search needs the continual form: the paper's draws its D' anew from each version")
        if len(load_samples(self._stores.artifacts.get(target.samples))) < 2:
            raise InvalidSamples("a search holds some of the target samples out: give at least two")
        return ledger.lineage(model).order((target,), recipe)

    def _target(
        self, model: str, request_id: str | None, behaviour: Behaviour | None, samples: str | Path | None
    ) -> ErasureTarget:
        from fsu_ray.service.requests import keep_samples

        if (request_id is None) == (behaviour is None):
            raise UserError(
                "say what is to be erased: --request ID, or --behaviour NAME --target CLASS --samples FOLDER"
            )
        if request_id is not None:
            request = self._stores.ledger.requests.get(request_id)
            if request.model != model:
                raise UserError(f"request {request.id} is one of {request.model!r}, not of {model!r}")
            if request.status.is_terminal:
                raise TransitionRefused(
                    f"request {request.id} is {request.status.value}: search for one that has not ended"
                )
            return ErasureTarget(request.id, request.behaviour, request.samples)
        if behaviour is None or samples is None:
            raise UserError("--behaviour goes with --target CLASS and --samples FOLDER")
        return ErasureTarget("search", behaviour, keep_samples(self._stores, model, samples)[0])


def _parsed(changes: Sequence[Change]) -> tuple[dict[str, Any], ...]:
    return tuple(parse_change(change) if isinstance(change, str) else change for change in changes)
