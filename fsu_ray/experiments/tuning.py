"""Figure 5: D_r and D_e by the given share of D_e, for Ours and for EUBO, whose lambda is tuned on the test split."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from fsu_ray.experiments import images
from fsu_ray.experiments.bayes import bayes_cell, lambda_at
from fsu_ray.experiments.catalogue import Row, Scale, Table, Work
from fsu_ray.experiments.images import FULL, FULL_SHOT
from fsu_ray.experiments.markdown import spread, table

RHOS = (0.01, 0.03, 0.1, 0.3, 1.0)
SHARES = (0.95, 1.0, 1.02, 1.04, 1.07, 1.1, 1.15, 1.3)
"""EUBO is tuned over the lambdas at these shares (`bayes.lambda_at`)."""


def _cells(scale: Scale, seeds: int) -> list[Work]:
    works: list[Work] = []
    for seed in range(seeds):
        original = images.classifier("class9", "lenet5", seed, scale)
        drawn = images.dataset(images.inverter(original, scale), {})
        lambdas = [lambda_at(original, share) for share in SHARES]
        works.append(("classifier", original))
        works.append(("oracle", {"classifier": original, "how": "scratch", "epochs": original["epochs"], "seed": seed}))
        for rho in RHOS:
            kind, cell = images.erasure(drawn, rho, FULL_SHOT if rho == FULL else {})
            works.append((kind, {**cell, "variant": "Ours"}))
            works.append(bayes_cell(original, "eubo", rho, lambdas=lambdas))
    return works


def worth(rows: list[Row]) -> float:
    """The harmonic mean of D_r and 100 - D_e, in percent, averaged over rows."""
    return statistics.fmean(2 / (1 / max(row["D_r"], 1e-9) + 1 / max(100 - row["D_e"], 1e-9)) for row in rows)


def _tuned(rows: list[Row], rhos: tuple[float, ...]) -> str:
    """The lambda with the highest `worth` over `rhos`."""
    by_lambda: dict[str, list[Row]] = {}
    for row in rows:
        if row["rho"] in rhos:
            by_lambda.setdefault(row["lambda"], []).append(row)
    return max(sorted(by_lambda), key=lambda cut: worth(by_lambda[cut]))


def _report(rows: list[Row], folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    eubo = [row for row in rows if row["piece"] == "bayes"]
    ours = [row for row in rows if row["piece"] == "erasure"]
    once, at_rho = _tuned(eubo, (FULL,)), {rho: _tuned(eubo, (rho,)) for rho in RHOS}
    curves: dict[str, list[list[Row]]] = {
        "Ours": [[row for row in ours if row["rho"] == rho] for rho in RHOS],
        "EUBO, tuned at rho 1": [[row for row in eubo if (row["rho"], row["lambda"]) == (rho, once)] for rho in RHOS],
        "EUBO, tuned at each rho": [[r for r in eubo if (r["rho"], r["lambda"]) == (rho, at_rho[rho])] for rho in RHOS],
    }
    level = {"Original": [row for row in rows if row["piece"] == "classifier"],
             "Oracle, from scratch": [row for row in rows if row["piece"] == "oracle"]}  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(8.5, 3.5), layout="constrained")
    for axis, key in zip(axes, ("D_r", "D_e"), strict=True):
        for name, curve in curves.items():
            values = [[row[key] for row in point] for point in curve]
            axis.errorbar(RHOS, [statistics.fmean(v) for v in values], [statistics.pstdev(v) for v in values],
                          fmt="o-", capsize=2, label=name, alpha=0.8)  # fmt: skip
        for (name, flat), style in zip(level.items(), (":", "--"), strict=True):
            axis.axhline(statistics.fmean(row[key] for row in flat), color="k", linestyle=style, label=name)
        axis.set(xscale="log", xlabel="rho, the share of D_e that is given", ylabel=f"accuracy on {key}, %")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.savefig(folder / "figure5.png", dpi=110)
    pyplot.close(figure)
    lines = [[name, "", *_both(flat)] for name, flat in level.items()]
    for name, curve in curves.items():
        lines += [[name, f"{rho:g}", *_both(point)] for rho, point in zip(RHOS, curve, strict=True)]
    at_each = "; ".join(f"{rho:g}: {_power(at_rho[rho])}" for rho in RHOS)
    return (
        "![figure 5](figure5.png)\n\n" + table(["method", "rho", "D_r", "D_e"], lines)
        + f"\nSeeds {sorted({row['seed'] for row in rows})}. Lambda is chosen by the test accuracy on D_r and D_e (the "
        "harmonic mean of D_r and 100 - D_e), which no unlearner has; Ours is not tuned. EUBO's lambda at rho 1: "
        f"{_power(once)}; at each rho, {at_each}. The paper tuned once (10^-2410, for a last layer of six times the "
        "size) and says that EUBO fails where rho is small.\n"
    )  # fmt: skip


def _both(rows: list[Row]) -> list[str]:
    return [spread(row[key] for row in rows) for key in ("D_r", "D_e")]


def _power(cut: str) -> str:
    """A lambda that no float can hold, as a power of ten."""
    digits, _, exponent = cut.partition("e")
    return f"10^{int(exponent or 0) + math.log10(float(digits)):.1f}"


TABLES = {"figure5": Table(_cells, _report)}
