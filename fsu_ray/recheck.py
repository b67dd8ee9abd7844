"""Whether what was erased is still gone: the probes of a version's erasures, measured again on its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fsu_ray.gate import refuse_result
from fsu_ray.recipes import GateRecipe
from fsu_ray.records import Erasure, Model, ModelVersion
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.database import check_actor
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.models import Measured

if TYPE_CHECKING:
    from fsu_ray.models.classifier import Classifier

ProgressCallback = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class RecheckResult:
    """An erasure measured again: `recorded` is the share of its probes in a target class when it was erased, `share`
    the one now, None without any probe."""

    erasure: Erasure
    probes: int
    recorded: float
    share: float | None
    passed: bool


def recheck(
    ledger: Ledger, artifacts: Artifacts, reference: str, actor: str, on_progress: ProgressCallback | None = None
) -> tuple[Model, ModelVersion, list[RecheckResult]]:
    """Measure every erasure in force at `reference` (`Ledger.models.resolve`) on that version's weights, oldest first.

    All are measured before any is recorded. An erasure passes by the rule that later requests must keep to, with the
    bounds of its own recipe. Raises NotFound, UserError for an actor that is none, and StorageError where the weights
    or the probes of an erasure are missing.
    """
    check_actor(actor)
    model, version = ledger.models.resolve(reference)
    erasures = ledger.models.erasures(model.name, version.number)
    if not erasures:
        return model, version, []
    classifier = _classifier(artifacts, model, version)
    gates = {request.id: request.recipe.gate for request in ledger.requests.all(model.name)}
    found = []
    for done, erasure in enumerate(erasures, 1):
        found.append(_measure(artifacts, classifier, erasure, gates[erasure.request]))
        if on_progress:
            on_progress("recheck", done, len(erasures), {})
    measured = [Measured(each.erasure.id, each.probes, each.share, each.passed) for each in found]
    ledger.models.record_rechecks(model.name, version.number, measured, actor)
    return model, version, found


def _classifier(artifacts: Artifacts, model: Model, version: ModelVersion) -> Classifier:
    from fsu_ray.method.precision import default_device
    from fsu_ray.models.classifier import Classifier

    return Classifier.from_bytes(model.spec, artifacts.get(version.weights)).to(default_device())


def _measure(artifacts: Artifacts, classifier: Classifier, erasure: Erasure, gate: GateRecipe) -> RecheckResult:
    from fsu_ray.method.evaluate import share_in
    from fsu_ray.method.fit import predict
    from fsu_ray.method.inputs import load_samples

    pixels = load_samples(artifacts.get(erasure.probes))
    share = share_in(predict(classifier, pixels), erasure.behaviour.targets)
    recorded = (erasure.report.get("forgetting") or {}).get("probes_in_target") or 0.0
    return RecheckResult(erasure, len(pixels), recorded, share, _still_gone(erasure, share, recorded, gate))


def _still_gone(erasure: Erasure, share: float | None, recorded: float, gate: GateRecipe) -> bool:
    """What `gate` would say of this erasure if it were one of the earlier ones of a request."""
    prior = {"behaviour": erasure.behaviour.name, "probes_in_target": share, "recorded": recorded}
    nothing = {"samples_in_target": None, "probes_in_target": None}
    return refuse_result({"forgetting": nothing, "earlier": [prior], "retention": {"agreement": 1.0}}, gate) is None
