"""Requests in sequence: what shares a generator and what does not, and what the report makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsu_ray.experiments import images, sequences
from fsu_ray.experiments.mnist import Bench

QUICK = {
    "invert": {"steps": 60, "batch": 60, "width": 4, "weights": {"entropy": 10.0}},
    "synthesize": {"per_class": 20, "entropy_threshold": 2.3, "max_draws": 8, "starved_below": 0.0},
    "relearn": {"epochs": 2, "lr": 0.01},
    "gate": {"coverage_min": 0.0, "acceptance_min": 0.0, "dataset_agreement_min": 0.0, "bn_distance_max": 100.0},
}


@pytest.mark.mnist
def test_one_generator_or_one_a_request(part: Bench, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the second request finds the first one's generator; by the other policies each trains its own, from
    the root with the masks of earlier erasures, or from the current version without any."""
    orders = []
    inner = sequences.unlearn
    monkeypatch.setattr(sequences, "unlearn", lambda order, *rest: (orders.append(order), inner(order, *rest))[1])
    original = {**images.classifier("class9", "lenet5", 1, "small"), "epochs": 4}
    for variant, uses in (("shared", "reused"), ("each", "trained"), ("each, no probes", "trained")):
        changes, policy, more = sequences.VARIANTS[variant]
        cell = {"classifier": original, "variant": variant, "changes": {**QUICK, **changes},
                "policy": policy.model_dump(mode="json"), "classes": [9, 4], "seed": 1, **more}  # fmt: skip
        rows = make.rows("sequence", cell)
        assert [(row["request"], row["erased"]) for row in rows] == [(0, "-"), (1, "9"), (2, "4")], rows
        assert [row["use"] for row in rows[1:]] == ["trained", uses]
        assert rows[1]["D_9"] < 20 < rows[0]["D_9"]
        assert {"D_9", "D_4", "D_r"} <= set(rows[2])
        second = orders[-1]
        assert second.current_weights != second.root_weights
        assert [prior.behaviour.name for prior in second.earlier_erasures] == ["class-9"]
        assert second.recipe.form == ("paper" if variant == "each, no probes" else "continual")
        assert second.recipe.gate.returned_max == 1
        differ = orders[-2].recipe.invert.seed != second.recipe.invert.seed
        assert differ == (variant == "each"), "by one seed a root has one generator, however often it is trained"


def test_the_report_names_the_worst(tmp_path: Path) -> None:
    """Of each variant: mean and spread, the highest of the erased classes, and why a line ended early."""
    rows = []
    for seed in (0, 1):
        for variant in sequences.VARIANTS:
            same = {"seed": seed, "variant": variant}
            rows.append({**same, "request": 0, "erased": "-", "D_r": 99.5, "D_9": 98.0, "D_4": 99.0})
            first = {"erased": "9", "D_r": 99.0 + seed, "D_9": 0.5, "seconds": 10.0, "use": "trained"}
            second = {"erased": "4", "D_r": 99.0, "D_9": 7.0 * seed, "D_4": 1.0, "seconds": 3.0, "use": "reused"}
            if variant == "each" and seed:
                second = {"erased": "4", "seconds": 1.0, "reason": "retention_lost: 0.9"}
            rows += [{**same, "request": 1, **first}, {**same, "request": 2, **second}]
    columns = {column for row in rows for column in row}
    filled = [{column: row.get(column) for column in columns} for row in rows]  # as Parquet gives them back
    text = sequences.TABLES["sequence"].report(filled, tmp_path)
    assert "| 9 | 99.50 ± 0.71 | 0.50 ± 0.00 | 0.50 | 10.0 ± 0.0 | trained |" in text
    assert "| 4 | 99.00 ± 0.00 | 4.00 ± 4.24 | 7.00 | 3.0 ± 0.0 | reused |" in text
    assert "A line ended: retention_lost: 0.9." in text
    assert (tmp_path / "sequence.png").stat().st_size > 5000
