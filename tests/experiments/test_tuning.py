"""Figure 5: how lambda is chosen, and the curves of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsu_ray.experiments import tuning
from fsu_ray.experiments.catalogue import Row


def test_a_cell_for_each_share() -> None:
    """EUBO sees the shares that Ours does, and is tuned over the same lambdas at each."""
    works = tuning.TABLES["figure5"].cells("small", 2)
    shares = {kind: [cell["rho"] for k, cell in works if k == kind] for kind in ("erasure", "bayes")}
    assert shares["erasure"] == shares["bayes"] == [*tuning.RHOS] * 2
    lambdas = {tuple(cell["lambdas"]) for kind, cell in works if kind == "bayes"}
    assert len(lambdas) == 1
    assert len(set(*lambdas)) == len(tuning.SHARES)


def test_worth() -> None:
    """The harmonic mean of D_r and 100 - D_e is 0 if either is 0."""
    assert tuning.worth([{"D_r": 80.0, "D_e": 20.0}]) == pytest.approx(80)
    assert tuning.worth([{"D_r": 100.0, "D_e": 100.0}]) < 0.01
    assert tuning.worth([{"D_r": 60.0, "D_e": 0.0}]) == pytest.approx(75)


def test_lambda_is_tuned_once_and_for_each_share(tmp_path: Path) -> None:
    """EUBO tuned at rho 1 fails at a small rho; tuned at the small rho it does not."""
    rows: list[Row] = [{"piece": "classifier", "seed": 0, "D_r": 99.4, "D_e": 98.0}]
    rows.append({"piece": "oracle", "seed": 0, "D_r": 99.5, "D_e": 0.0})
    for rho in tuning.RHOS:
        rows.append({"piece": "erasure", "seed": 0, "rho": rho, "D_r": 99.3, "D_e": 0.1})
        for cut, best in (("1e-170", 1.0), ("2e-200", 0.0)):
            d_e = 0.0 if cut == "2e-200" or rho == 1 else 95.0
            d_r = 99.0 if (rho == 1) == (best == 1) else 97.0
            rows.append({"piece": "bayes", "seed": 0, "rho": rho, "lambda": cut, "D_r": d_r, "D_e": d_e})
    text = tuning.TABLES["figure5"].report(rows, tmp_path)
    assert "| EUBO, tuned at rho 1 | 1 | 99.00 | 0.00 |" in text
    assert "| EUBO, tuned at rho 1 | 0.03 | 97.00 | 95.00 |" in text
    assert "| EUBO, tuned at each rho | 0.03 | 99.00 | 0.00 |" in text
    assert "| Ours | 0.03 | 99.30 | 0.10 |" in text
    assert "EUBO's lambda at rho 1: 10^-170.0; at each rho, 0.01: 10^-199.7" in text
    assert (tmp_path / "figure5.png").stat().st_size > 5000
