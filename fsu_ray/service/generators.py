"""Generators and their D': showing, importing, retiring, sealing."""

from __future__ import annotations

import hashlib
from functools import partial

from fsu_ray.errors import AlreadyExists, UserError
from fsu_ray.gate import refuse_generator
from fsu_ray.recipes import Recipe
from fsu_ray.records import OPERATOR, Digest, Generator, ProgressCallback
from fsu_ray.service.models import Weights, read_weights
from fsu_ray.service.stores import Stores


class Generators:
    """`service.generators`. Where an id is wanted, the beginning of it is enough."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def all(self, model: str | None = None) -> list[Generator]:
        """Generators, oldest first, of one model or all; raises NotFound."""
        return self._stores.ledger.generators.all(model)

    def get(self, generator: str) -> Generator:
        """One generator; raises NotFound where the id fits none or several."""
        return self._stores.ledger.generators.get(generator)

    def uses(self, model: str | None = None) -> dict[str, int]:
        """The number of erasures in force that each generator served, by its id; raises NotFound."""
        return self._stores.ledger.generators.uses(model)

    def path(self, digest: str) -> str | None:
        """Where the weights or the D' of a generator are stored; None where they are deleted."""
        artifacts = self._stores.artifacts
        return str(artifacts.path(digest)) if artifacts.has(digest) else None

    def refusals(self, generator: Generator, recipe: Recipe) -> list[str]:
        """Why the gate of `recipe` would refuse a generator as it is; empty where it would take it."""
        return list(refuse_generator(generator.metrics, recipe.gate))

    def import_(
        self,
        model: str,
        weights: Weights,
        recipe: Recipe,
        latent: int | None = None,
        actor: str = OPERATOR,
        on_progress: ProgressCallback | None = None,
    ) -> Generator:
        """Take over a generator that was trained elsewhere, and draw its D' in this process.

        `weights` is the `state_dict` of `models.generator.Generator` as safetensors. `latent` is the number of
        dimensions of its z, that of `recipe` where it is None. Raises NotFound, InvalidWeights where it does not fit
        the model, AlreadyExists, TransitionRefused where another version labels D' by now, UserError for the paper's
        recipe or an actor that is no opaque id.
        """
        from fsu_ray.method.generators import adopt
        from fsu_ray.method.precision import default_device
        from fsu_ray.storage.database import check_actor

        check_actor(actor)
        ledger, content = self._stores.ledger, read_weights(weights)
        if recipe.form == "paper":
            raise UserError("the paper's form draws D' anew from each version: import for another recipe")
        ledger.generators.check_import(model, Digest(hashlib.sha256(content).hexdigest()), recipe)
        state = ledger.lineage(model)
        size, on_step = latent or recipe.invert.latent, partial(on_progress, "synthesize") if on_progress else None
        adopted = adopt(self._stores.artifacts, state.order((), recipe), content, size, default_device(), on_step)
        return ledger.generators.add_imported(
            model, state.root, recipe, adopted.weights, adopted.dataset, adopted.metrics, actor
        )

    def retire(self, generator: str, actor: str = OPERATOR) -> Generator:
        """Offer a generator to no further request, and delete its weights and its D'.

        Raises NotFound, AlreadyExists where it is retired, TransitionRefused while a request may use it.
        """
        from fsu_ray.retention import retire

        return retire(self._stores.ledger, self._stores.artifacts, generator, "operator", actor)

    def seal(self, generator: str, actor: str = OPERATOR) -> Generator:
        """Write all masks of the model into a new D', and delete the old D' and the generator that drew it.

        The latest version labels D' from then on. The model's policy says whether the root's weights are deleted too.
        Raises NotFound, AlreadyExists where it is sealed or retired, TransitionRefused while a request may use it, and
        UserError where there is no mask to write, D' has the labels of an older root, or an alias points to a root
        that is to be deleted.
        """
        from fsu_ray.method.seal import seal
        from fsu_ray.retention import destroy

        ledger, artifacts = self._stores.ledger, self._stores.artifacts
        sealed = ledger.generators.get(generator)
        state = ledger.lineage(sealed.model)
        model, base, root, masks = state.model, state.base, state.root, state.earlier_erasures
        if (sealed.sealed or sealed.root) != root.number:
            raise UserError(f"generator {sealed.id} has the labels of version {sealed.root}; seal one of {root.number}")
        if not masks:
            raise UserError(f"nothing is erased from {model.name!r} yet: there is no mask to write")
        aliases = [alias for alias, move in ledger.models.aliases(model.name).items() if move.version == base.root]
        if aliases and ledger.models.policy(model.name).seal == "root":
            raise UserError(f"alias {aliases[0]!r} points to the root, which is to be deleted; move it first")
        if sealed.sealed or sealed.retired:
            raise AlreadyExists(f"generator {sealed.id} is {'retired' if sealed.retired else 'sealed'} already")
        dataset = seal(artifacts, model.spec, root.weights, sealed.dataset, masks)
        destroy(artifacts, ledger.generators.seal(sealed, base, dataset, actor))
        return ledger.generators.get(sealed.id)
