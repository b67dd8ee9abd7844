"""Requests to erase a behaviour: submitting, showing, cancelling, approving."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fsu_ray.errors import NotFound, UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import OPERATOR, Behaviour, Digest, Request, RequestEvent, SearchedRecipe, Status, Terms
from fsu_ray.service.recipes import Recipes, ResolvedRecipe
from fsu_ray.service.stores import Stores


class Requests:
    """`service.requests`. Where an id is wanted, the beginning of it is enough."""

    def __init__(self, stores: Stores, recipes: Recipes) -> None:
        self._stores = stores
        self._recipes = recipes

    def submit(
        self,
        model: str,
        behaviour: Behaviour,
        samples: str | Path,
        recipe: Recipe | ResolvedRecipe | None = None,
        terms: Terms | None = None,
    ) -> tuple[Request, bool]:
        """Queue a request to erase `behaviour` from `model`; returns the request and whether it is new.

        `samples` is a folder of images, an image or a Parquet file. Without a `recipe`, `service.recipes.resolve`
        chooses it. Everything is checked before anything is written. Raises NotFound, InvalidBehaviour,
        InvalidSamples, AlreadyErased, GeneratorUnfit, AlreadyExists for a key that another request has.
        """
        if recipe is None:
            recipe = self._recipes.resolve(model, behaviour.kind)
        values, named = (recipe.recipe, recipe.named) if isinstance(recipe, ResolvedRecipe) else (recipe, True)
        ledger = self._stores.ledger
        ledger.requests.check_behaviour(model, behaviour)
        ledger.requests.check_generator(model, values, terms or Terms())
        digest, count = keep_samples(self._stores, model, samples)
        return ledger.requests.submit(model, behaviour, digest, count, values, terms, named=named)

    def all(self, model: str | None = None, status: Status | str | None = None, overdue: bool = False) -> list[Request]:
        """Requests in the order of their submission, of one model or all, in one state or any.

        `overdue`: only requests that are late and have not ended. Raises NotFound, UserError for an unknown status.
        """
        if status is not None and status not in list(Status):
            raise UserError(f"no status {status!r}: use {', '.join(Status)}")
        requests = self._stores.ledger.requests.all(model, None if status is None else Status(status))
        now = datetime.now(UTC)
        return [r for r in requests if not overdue or (r.overdue(now) and not r.status.is_terminal)]

    def get(self, request: str) -> Request:
        """One request; raises NotFound where the id fits none or several."""
        return self._stores.ledger.requests.get(request)

    def events(self, request: str) -> list[RequestEvent]:
        """The steps of a request between its states, oldest first; raises NotFound."""
        return self._stores.ledger.requests.events(request)

    def recipe_origin(self, request: Request) -> SearchedRecipe | None:
        """The search that found the recipe of a request; None where it is of no search."""
        return self._stores.ledger.recipes.origin(request)

    def cancel(self, request: str, actor: str = OPERATOR) -> Request:
        """End a request: at once where it waits, at its next step where it runs; raises NotFound, TransitionRefused."""
        return self._stores.ledger.requests.cancel(request, actor)

    def approve(self, request: str, actor: str) -> Request:
        """Queue a request that awaits approval. `actor` must not be the requester. Raises NotFound, UserError,
        TransitionRefused."""
        return self._stores.ledger.requests.approve(request, actor)

    def deny(self, request: str, actor: str) -> Request:
        """End a request that awaits approval as rejected; raises as `approve` does."""
        return self._stores.ledger.requests.deny(request, actor)

    def check_known(self, request: str) -> None:
        """Raise NotFound where this ledger has no such request, so that it is not the ledger of the job's sender."""
        try:
            self.get(request)
        except NotFound:
            raise NotFound(
                f"the ledger of this job has no request {request}: it is not that of the sender; let the cluster have "
                "the same FSU_LEDGER, or a folder (FSU_HOME) that it shares with the sender"
            ) from None


def keep_samples(stores: Stores, model: str, samples: str | Path) -> tuple[Digest, int]:
    """Read the target samples for a model and store them; returns their digest and their number.

    Raises NotFound, InvalidSamples.
    """
    from fsu_ray.method.datasets import read_samples
    from fsu_ray.method.inputs import save_samples

    pixels = read_samples(str(samples), stores.ledger.models.get(model).spec.shape)
    return stores.artifacts.put(save_samples(pixels)), len(pixels)
