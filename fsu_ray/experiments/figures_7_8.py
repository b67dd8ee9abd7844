"""Figures 7 and 8: seconds of the method's parts, and Fisher's noise by its strength. MNIST, class 9, LeNet5; Figure 7
also has PreActResNet-18, with one classifier and one inverter for all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsu_ray.experiments import images
from fsu_ray.experiments.catalogue import Row, Scale, Table, Work
from fsu_ray.experiments.images import FEW, FULL
from fsu_ray.experiments.markdown import spread, table

ALPHAS = (1e-8, 5e-8, 1e-7, 1.5e-7, 2e-7, 2.5e-7, 3e-7, 3.5e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
"""The strengths that the paper sweeps (Figure 8), to 3.5e-7, and larger ones: LeNet5 loses nothing at 3.5e-7."""
SAMPLES = {"small": 2000, "paper": 5000}
"""Images for the Fisher information."""


def _seed(seed: int, scale: Scale, arch: str = "lenet5") -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The cells of a seed's classifier, generator and D'."""
    original = images.classifier("class9", arch, seed, scale)
    inverter = images.inverter(original, scale)
    return original, inverter, images.dataset(inverter, {})


def _figure7_cells(scale: Scale, seeds: int) -> list[Work]:
    cells: list[Work] = []
    for net, seed in [("lenet5", seed) for seed in range(seeds)] + [(images.DEEP[scale], 0)]:
        original, inverter, drawn = _seed(seed, scale, net)
        cells += [("classifier", original), ("generator", inverter), ("dataset", drawn)]
        cells.append(images.erasure(drawn, FEW, {}))
    return cells


def _figure7_report(rows: list[Row], folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = {"training": "classifier", "generator": "generator", "D'": "dataset", "unlearning": "erasure"}
    nets = list(dict.fromkeys(row["arch"] for row in rows))
    seconds = {
        net: {
            name: [row["seconds"] for row in rows if (row["arch"], row["piece"]) == (net, kind)]
            for name, kind in parts.items()
        }
        for net in nets
    }
    lines = []
    figure, axes = pyplot.subplots(1, len(nets), figsize=(4.2 * len(nets), 3.2), layout="constrained", squeeze=False)
    for net, axis in zip(nets, axes[0], strict=True):
        means = {name: statistics.fmean(values) for name, values in seconds[net].items()}
        axis.bar(list(means), list(means.values()))
        for at, value in enumerate(means.values()):
            axis.annotate(f"{value:.0f} s", (at, value), ha="center", va="bottom")
        axis.margins(y=0.12)  # room for the numbers
        axis.set(ylabel="seconds", title=f"{net}, class 9, 3 %")
        first = means["generator"] + means["D'"] + means["unlearning"]
        lines.append([net, *(spread(values, 1) for values in seconds[net].values()), f"{first:.1f}",
                      f"{means['unlearning']:.1f}"])  # fmt: skip
    figure.savefig(folder / "figure7.png", dpi=110)
    pyplot.close(figure)
    return (
        "![figure 7](figure7.png)\n\n" + table(["seconds", *parts, "first request", "later request"], lines)
        + "\nEach part had one CPU, or one GPU, to itself. A later request trains no generator and draws no D'. The "
        "paper's text has no numbers for this; it says that the generator takes longest.\n"
    )  # fmt: skip


def _figure8_cells(scale: Scale, seeds: int) -> list[Work]:
    cells: list[Work] = []
    for seed in range(seeds):
        original, _, drawn = _seed(seed, scale)
        cells.append(("fisher", {"classifier": original, "rho": FULL, "samples": SAMPLES[scale],
                                 "alphas": list(ALPHAS), "seed": seed}))  # fmt: skip
        for how in ("finetuned", "scratch"):
            cells.append(("oracle", {"classifier": original, "how": how, "epochs": original["epochs"], "seed": seed}))
        cells += [("classifier", original), images.erasure(drawn, FEW, {})]
    return cells


def _figure8_report(rows: list[Row], folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = next(row["epochs"] for row in rows if row["piece"] == "oracle")
    groups: dict[str, Callable[[Row], bool]] = {
        "Original": lambda row: row["piece"] == "classifier",
        f"Oracle, fine-tuned, {epochs} epochs": lambda row: row["how"] == "finetuned",
        "Oracle, from scratch": lambda row: row["how"] == "scratch",
        "Ours, 3 %": lambda row: row["piece"] == "erasure",
        **{f"Fisher {alpha:g}": lambda row, alpha=alpha: row["alpha"] == alpha for alpha in ALPHAS},  # type: ignore[misc]
    }
    by_method = {name: [row for row in map(_all_columns, rows) if holds(row)] for name, holds in groups.items()}
    figure, axis = pyplot.subplots(figsize=(5.5, 4.2), layout="constrained")
    fisher = [name for name in by_method if name.startswith("Fisher")]
    marks = [([name], name, "o") for name in by_method if name not in fisher]
    for names, label, style in [*marks, (fisher, "Fisher", "s-")]:
        values = {key: [[row[key] for row in by_method[name]] for name in names] for key in ("D_e", "D_r")}
        (across, wide), (up, high) = (
            ([statistics.fmean(v) for v in points], [statistics.pstdev(v) for v in points])
            for points in values.values()
        )
        axis.errorbar(across, up, xerr=wide, yerr=high, fmt=style, capsize=2, label=label, alpha=0.8)
    axis.set(xlabel="accuracy on D_e, %", ylabel="accuracy on D_r, %", title="class 9, LeNet5")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(folder / "figure8.png", dpi=110)
    pyplot.close(figure)
    lines = [
        [name, *(spread(row[key] for row in of_method) for key in ("D_r", "D_e"))]
        for name, of_method in by_method.items()
    ]
    return (
        "![figure 8](figure8.png)\n\n" + table(["method", "D_r", "D_e"], lines)
        + f"\nSeeds {sorted({row['seed'] for row in rows})}. Fisher sees all of D_r and all of D_e; Ours sees 3 % of "
        "D_e.\n"
    )  # fmt: skip


def _all_columns(row: Row) -> Row:
    """The row with the columns that only some cell types have: Parquet adds them to all rows."""
    return {"how": None, "alpha": None, **row}


TABLES = {"figure7": Table(_figure7_cells, _figure7_report), "figure8": Table(_figure8_cells, _figure8_report)}
