"""Is a behaviour that was erased still erased? Measures the probes of a version's erasures again on its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fsu_ray.gate import refuse_result
from fsu_ray.recipes import GateRecipe
from fsu_ray.records import Erasure, Model, ModelVersion, ProgressCallback
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.database import check_actor
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.models import Measured

if TYPE_CHECKING:
    from fsu_ray.models.classifier import Classifier


@dataclass(frozen=True)
class RecheckResult:
    """An erasure measured again on `probes` samples.

    `recorded`: the share of probes in a target class when the behaviour was erased. `share`: the share now, None
    without probes. `passed`: whether the behaviour still counts as erased.
    """

    erasure: Erasure
    probes: int
    recorded: float
    share: float | None
    passed: bool


def recheck(
    ledger: Ledger, artifacts: Artifacts, reference: str, actor: str, on_progress: ProgressCallback | None = None
) -> tuple[Model, ModelVersion, list[RecheckResult]]:
    """Measure every erasure in force at `reference` (see `Ledger.models.resolve`) on that version's weights.

    Returns the results, oldest erasure first. All are measured before any is recorded in the ledger. An erasure passes
    if the gate would let a later request pass, with the bounds of the erasure's own recipe. Raises NotFound, UserError
    for an invalid actor, and StorageError if the weights or the probes of an erasure are missing.
    """
    check_actor(actor)
    model, version = ledger.models.resolve(reference)
    erasures = ledger.models.erasures(model.name, version.number)
    if not erasures:
        return model, version, []
    classifier = _classifier(artifacts, model, version)
    gates = {request.id: request.recipe.gate for request in ledger.requests.all(model.name)}
    results = []
    for done, erasure in enumerate(erasures, 1):
        results.append(_measure(artifacts, classifier, erasure, gates[erasure.request]))
        if on_progress:
            on_progress("recheck", done, len(erasures), {})
    measured = [Measured(result.erasure.id, result.probes, result.share, result.passed) for result in results]
    ledger.models.record_rechecks(model.name, version.number, measured, actor)
    return model, version, results


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
    return RecheckResult(erasure, len(pixels), recorded, share, _still_erased(erasure, share, recorded, gate))


def _still_erased(erasure: Erasure, share: float | None, recorded: float, gate: GateRecipe) -> bool:
    """Whether `gate` would pass a request that had this erasure as an earlier one."""
    earlier = {"behaviour": erasure.behaviour.name, "probes_in_target": share, "recorded": recorded}
    nothing = {"samples_in_target": None, "probes_in_target": None}
    return refuse_result({"forgetting": nothing, "earlier": [earlier], "retention": {"agreement": 1.0}}, gate) is None
