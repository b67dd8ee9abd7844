"""Models and their versions: registering, showing, aliases, policies, what is erased from them, and re-checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsu_ray.errors import InvalidData, InvalidWeights
from fsu_ray.records import (
    OPERATOR,
    AliasMove,
    Behaviour,
    Erasure,
    Model,
    ModelSpec,
    ModelVersion,
    Policy,
    ProgressCallback,
)
from fsu_ray.service.stores import Stores

if TYPE_CHECKING:
    from fsu_ray.recheck import RecheckResult
    from fsu_ray.storage.models import ErasureSummary

Weights = bytes | str | Path
"""The bytes of a safetensors file, or the path of the file."""


class Models:
    """`service.models`."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def register(
        self, name: str, spec: ModelSpec, weights: Weights, test_set: str | None = None, actor: str = OPERATOR
    ) -> Model:
        """Register a model. Its weights become version 1.

        `test_set` is `digits`, `mnist`, `cifar10`, an image folder or a Parquet file; later reports measure the
        accuracy on it. The weights are tried on the architecture, and the test set is read, before anything is
        written. Raises AlreadyExists, UserError for a name that cannot be one, InvalidWeights, UnsupportedModel,
        InvalidData.
        """
        from fsu_ray.method.datasets import NAMED
        from fsu_ray.models.classifier import Classifier

        self.check_name_free(name)
        content = read_weights(weights)
        Classifier.from_bytes(spec, content)
        if test_set is not None:
            _check_test_set(test_set, spec)
            path = Path(test_set).expanduser()
            test_set = str(path.resolve()) if test_set not in NAMED and path.exists() else test_set
        digest = self._stores.artifacts.put(content)
        return self._stores.ledger.models.register(name, spec, digest, test_set, actor)

    def check_name_free(self, name: str) -> None:
        """Raise AlreadyExists where a model has this name, UserError where no model can have it."""
        self._stores.ledger.models.check_name_free(name)

    def update(self, name: str, weights: Weights, actor: str = OPERATOR) -> ModelVersion:
        """Add a version that was trained further outside. It is the root of later erasures.

        Raises NotFound, InvalidWeights, TransitionRefused while a request of the model runs.
        """
        from fsu_ray.models.classifier import Classifier

        model = self.get(name)
        content = read_weights(weights)
        Classifier.from_bytes(model.spec, content)
        return self._stores.ledger.models.add_version(name, self._stores.artifacts.put(content), actor)

    def all(self) -> list[Model]:
        """All models, by name."""
        return self._stores.ledger.models.all()

    def get(self, name: str) -> Model:
        """The model called `name`; raises NotFound."""
        return self._stores.ledger.models.get(name)

    def versions(self, model: str) -> list[ModelVersion]:
        """The versions of a model by number; raises NotFound."""
        return self._stores.ledger.models.versions(model)

    def version(self, model: str, number: int | None = None) -> ModelVersion:
        """A version of a model, the latest where `number` is None; raises NotFound."""
        return self._stores.ledger.models.version(model, number)

    def resolve(self, reference: str) -> tuple[Model, ModelVersion]:
        """The model and the version that `MODEL`, `MODEL@NUMBER` or `MODEL@ALIAS` names; raises NotFound, UserError."""
        return self._stores.ledger.models.resolve(reference)

    def policy(self, model: str) -> Policy:
        """The policy of a model; raises NotFound."""
        return self._stores.ledger.models.policy(model)

    def set_policy(self, model: str, policy: Policy, actor: str = OPERATOR) -> Policy:
        """Set the policy of a model from now on; raises NotFound, UserError for an actor that is no opaque id."""
        return self._stores.ledger.models.set_policy(model, policy, actor)

    def aliases(self, model: str) -> dict[str, AliasMove]:
        """The aliases of a model, each with the move that set it last; raises NotFound."""
        return self._stores.ledger.models.aliases(model)

    def alias_moves(self, model: str) -> list[AliasMove]:
        """Every move of an alias of a model, oldest first; raises NotFound."""
        return self._stores.ledger.models.alias_moves(model)

    def move_alias(
        self, model: str, alias: str, version: int | str, actor: str = OPERATOR, *, force: bool = False,
        reason: str | None = None,
    ) -> AliasMove:  # fmt: skip
        """Point `alias` to `version`, which is a number or another alias.

        A version that still has a behaviour which another version has lost is refused, unless `force` is set and
        `reason` is one word such as a ticket number. Raises NotFound, UserError, TransitionRefused.
        """
        _, target = self.resolve(f"{model}@{version}")
        return self._stores.ledger.models.move_alias(model, alias, target.number, actor, force=force, reason=reason)

    def erased(self, model: str, version: int | None = None) -> list[ErasureSummary]:
        """What is erased as of a version (the latest where it is None), oldest first, with its measures then and at
        the latest re-check; raises NotFound."""
        return self._stores.ledger.models.erased(model, version)

    def erased_by_version(self, model: str) -> dict[int, list[Behaviour]]:
        """The behaviours that each version of a model has lost itself, by its number; raises NotFound."""
        return self._stores.ledger.models.behaviours(model)

    def erasures(self, model: str, version: int | None = None) -> list[Erasure]:
        """The full records of `erased`, with masks, probes and reports; raises NotFound."""
        return self._stores.ledger.models.erasures(model, version)

    def all_erasures(self, model: str) -> list[Erasure]:
        """The erasures of all versions of a model, oldest first; raises NotFound."""
        return self._stores.ledger.models.all_erasures(model)

    def recheck(
        self, reference: str, actor: str = OPERATOR, on_progress: ProgressCallback | None = None
    ) -> tuple[Model, ModelVersion, list[RecheckResult]]:
        """Measure the probes of everything that is erased from a version again, on its weights, and record the result.

        `reference` as in `resolve`. Raises NotFound, UserError, and StorageError where weights or probes are missing.
        """
        from fsu_ray.recheck import recheck

        return recheck(self._stores.ledger, self._stores.artifacts, reference, actor, on_progress)

    def history(self, model: str) -> list[dict[str, Any]]:
        """What happened to a model, oldest first: dictionaries with `at`, `event`, `version`, `request`, `detail`."""
        return self._stores.ledger.models.history(model)


def read_weights(weights: Weights) -> bytes:
    """The content of a weights file; raises InvalidWeights where the file cannot be read."""
    if isinstance(weights, bytes):
        return weights
    try:
        return Path(weights).expanduser().read_bytes()
    except OSError as error:
        raise InvalidWeights(f"no weights at {weights} ({error.strerror}): give a safetensors file") from None


def _check_test_set(name: str, spec: ModelSpec) -> None:
    from fsu_ray.method.datasets import load

    labels = load(name, "test", spec.shape).labels
    if int(labels.max()) >= spec.classes:
        raise InvalidData(f"test set {name} has the class {int(labels.max())}, the model has {spec.classes} classes")
