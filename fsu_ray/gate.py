"""The two gates: may a generator be reused, and may a result become a version? Pure functions of metrics.

`refuse_generator` returns all reasons for a refusal, `refuse_result` the most important one; none means yes. A metric
that is not a number (NaN) is always refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsu_ray.recipes import GateRecipe


def refuse_generator(metrics: Mapping[str, Any], gate: GateRecipe) -> tuple[str, ...]:
    """Why D' and its generator may not serve the current version.

    `metrics` are those of `method.evaluate.generator_metrics`: `acceptance` (lowest share over the classes that must be
    covered), `coverage` (rarest class over mean), `bn_distance` (mean relative distance), `agreement` (with the current
    version outside all masks), `starved` (class numbers).
    """
    reasons = []
    if metrics["starved"]:
        reasons.append(f"starved classes {metrics['starved']}")
    if not metrics["agreement"] >= gate.dataset_agreement_min:
        reasons.append(f"agreement {metrics['agreement']:.3f} < {gate.dataset_agreement_min}")
    if not metrics["coverage"] >= gate.coverage_min:
        reasons.append(f"coverage {metrics['coverage']:.3f} < {gate.coverage_min}")
    if not metrics["acceptance"] >= gate.acceptance_min:
        reasons.append(f"acceptance {metrics['acceptance']:.3f} < {gate.acceptance_min}")
    if not metrics["bn_distance"] <= gate.bn_distance_max:
        reasons.append(f"BN distance {metrics['bn_distance']:.3f} > {gate.bn_distance_max}")
    return tuple(reasons)


def refuse_result(report: Mapping[str, Any], gate: GateRecipe) -> str | None:
    """Why a relearned classifier may not become a version: `not_forgotten`, `retention_lost` or `erasure_returned`,
    with the metric that failed; None when it may.

    `report` is one of `method.evaluate.measure`.
    """
    for name, share, number, most in _still_there(report["forgetting"], gate):
        if not share <= most:
            failed = f"{name} {share:.3f} (of {number}) > {most}"
            return f"not_forgotten: {failed}; try more samples or relearn.epochs"
    for erasure in report["earlier"]:
        share, recorded = erasure["probes_in_target"], erasure["recorded"]
        most = min(max(gate.returned_max, recorded), recorded + gate.returned_margin)
        if share is not None and not share <= most:
            return f"erasure_returned: {erasure['behaviour']} is at {share:.3f}, {recorded:.3f} when it was erased"
    agreement = report["retention"]["agreement"]
    if not agreement >= gate.agreement_min:
        return (
            f"retention_lost: agreement with the parent {agreement:.3f} < {gate.agreement_min}; try a lower relearn.lr"
        )
    return None


def _still_there(forgetting: Mapping[str, Any], gate: GateRecipe) -> list[tuple[str, float, int, float]]:
    """(name, share still in a target class, number of samples, largest allowed share) of each check.

    Where a share is of so few samples that one of them exceeds `forgotten_max`, that bound would demand a share of 0. A
    subset's probes hardly ever reach it: real members of the target class are among them. Such a share may be up to
    .5, and the samples count in the check of both shares together.
    """
    counts = {
        "samples_in_target": forgetting.get("samples_held_out") or forgetting.get("samples_given"),
        "probes_in_target": forgetting.get("probes"),
    }
    known = [(name, forgetting[name], number or 0) for name, number in counts.items() if forgetting[name] is not None]
    every = sum(number for *_, number in known)
    shares = []
    for name, share, number in known:
        few = number * gate.forgotten_max < 1
        shares.append((name, share, number, max(gate.forgotten_max, 0.5) if few else gate.forgotten_max))
    if every:  # where none are few, this says nothing new
        together = sum(share * number for _, share, number in known) / every
        shares.append((" and ".join(name for name, *_ in known), together, every, gate.forgotten_max))
    return [(name, round(share, 6), number, most) for name, share, number, most in shares]  # 1 of 20 in float32 is .05
