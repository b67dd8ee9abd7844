"""Tables 2 and 4 and the table of Figure 6: every method on one scenario, beside the paper's figures.

Fisher's strengths are chosen as in the paper's appendix C.1, by the means over seeds. Fisher_1 is the smallest strength
that moves D_e by a point or more while D_r stays within five points of the original's, else the largest that keeps D_r
there. Fisher_2 is the smallest that erases D_e by `ERASED`; there may be none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fsu_ray.experiments import images
from fsu_ray.experiments.bayes import bayes_cell
from fsu_ray.experiments.catalogue import Cell, Row, Scale, Table, Work
from fsu_ray.experiments.figures_7_8 import ALPHAS, SAMPLES
from fsu_ray.experiments.images import FEW, FULL, FULL_SHOT
from fsu_ray.experiments.markdown import spread, table
from fsu_ray.experiments.pictures import samples

ERASED: dict[str, Callable[[float], bool]] = {
    "class9": lambda d_e: d_e <= 5,
    "crossed7": lambda d_e: d_e >= 90,
    "truck": lambda d_e: d_e <= 5,
}
"""Whether a scenario's D_e counts as erased."""
MAX_LOSS, MIN_CHANGE = 5.0, 1.0
"""Points of D_r that Fisher_1 may lose, and points by which it must change D_e."""
PaperValues = dict[str, tuple[str, str]]
"""The paper's D_r and D_e by method; methods that are given a share of D_e have `few:` or `full:` before the name."""


@dataclass(frozen=True)
class Net:
    """A network at small scale, and the paper's values for it.

    `shared`: all seeds share one classifier and one inverter and differ in the draw of the given samples, and each
    baseline is computed once. Otherwise each seed has its own classifier and inverter.
    """

    arch: str
    shared: bool
    paper: PaperValues | None


def _cells(scenario: str, nets: tuple[Net, ...], large: str, baselines: bool) -> Callable[[Scale, int], list[Work]]:
    def cells(scale: Scale, seeds: int) -> list[Work]:
        works: dict[str, Work] = {}
        for net in nets if scale == "small" else (Net(large, False, None),):
            for seed in range(seeds):
                original = images.classifier(scenario, net.arch, 0 if net.shared else seed, scale)
                for work in _all_methods(original, seed, scale, baselines and not (net.shared and seed)):
                    works.setdefault(repr(work), work)
        return list(works.values())

    return cells


def _all_methods(original: Cell, seed: int, scale: Scale, baselines: bool) -> list[Work]:
    """Every method on one classifier, with the D_e,rho of `seed`."""
    gan = images.gan(original["scenario"], original["seed"], scale)
    datasets = {
        "Ours": images.dataset(images.inverter(original, scale), {}),
        "Ours+": images.dataset(gan, {}, original),
    }
    works: list[Work] = [("classifier", original)]
    for rho in (FULL, FEW):
        for name, drawn in datasets.items():
            kind, cell = images.erasure(drawn, rho, FULL_SHOT if rho == FULL else {}, seed)
            works.append((kind, {**cell, "variant": name}))
        if baselines:
            works.append(("fisher", {"classifier": original, "rho": rho, "samples": SAMPLES[scale],
                                     "alphas": list(ALPHAS), "seed": seed}))  # fmt: skip
            works += [bayes_cell(original, method, rho, seed) for method in ("eubo", "rkl")]
    for how in ("finetuned", "scratch"):
        works.append(("oracle", {"classifier": original, "how": how, "epochs": original["epochs"],
                                 "seed": original["seed"]}))  # fmt: skip
    return works


def fisher_strengths(rows: list[Row], scenario: str, d_r: float, d_e: float) -> tuple[float | None, float | None]:
    """The strengths of Fisher_1 and Fisher_2 among `rows`; the original has the accuracies `d_r` and `d_e`."""
    means = {}
    for alpha in sorted({row["alpha"] for row in rows}):
        at_alpha = [row for row in rows if row["alpha"] == alpha]
        means[alpha] = tuple(statistics.fmean(row[key] for row in at_alpha) for key in ("D_r", "D_e"))
    harmless = [alpha for alpha, (r, _) in means.items() if r >= d_r - MAX_LOSS]
    effective = [alpha for alpha in harmless if abs(means[alpha][1] - d_e) >= MIN_CHANGE]
    first = effective[0] if effective else harmless[-1] if harmless else None
    return first, next((alpha for alpha, (_, e) in means.items() if ERASED[scenario](e)), None)


def _lines(rows: list[Row], scenario: str, paper: PaperValues) -> list[list[str]]:
    """The lines of one network's table."""

    def line(name: str, of_method: list[Row], key: str, remark: str = "") -> list[str]:
        r, e = paper.get(key, ("-", "-"))
        d_r, d_e = (spread(row[key] for row in of_method) for key in ("D_r", "D_e"))
        return [name, r, d_r, e, d_e, remark]

    original = [row for row in rows if row["piece"] == "classifier"]
    bayes = {row["seed"]: row for row in rows if row["piece"] == "bayes"}.values()
    d_r, d_e = (statistics.fmean(row[key] for row in original) for key in ("D_r", "D_e"))
    lines = [line("Original", original, "Original")]
    if bayes:
        full = [{key: row[f"full_{key}"] for key in ("D_r", "D_e")} for row in bayes]
        lines.append(line("Original, its last layer Bayesian", full, ""))
    for how, name in (("scratch", "Oracle, from scratch"), ("finetuned", "Oracle, fine-tuned")):
        oracles = [row for row in rows if row["piece"] == "oracle" and row["how"] == how]
        lines.append(line(f"{name}, {oracles[0]['epochs']} epochs", oracles, "Oracle" if how == "finetuned" else ""))
    for rho, shot in ((FULL, "full"), (FEW, "few")):
        lines.append([f"*{'all of D_e' if rho == FULL else '3 % of D_e'}*", "", "", "", "", ""])
        fisher = [row for row in rows if row["piece"] == "fisher" and row["rho"] == rho]
        if fisher:
            for number, alpha in enumerate(fisher_strengths(fisher, scenario, d_r, d_e), 1):
                at_alpha = [row for row in fisher if row["alpha"] == alpha]
                remark = "no strength does" if alpha is None else f"lambda {alpha:g}"
                lines.append(line(f"Fisher_{number}", at_alpha, f"{shot}:Fisher_{number}", remark))
        for method in ("EUBO", "RKL"):
            at_rho = [row for row in rows if row["piece"] == "bayes" and row["rho"] == rho]
            of_method = [row for row in at_rho if row["method"] == method.lower()]
            if of_method:
                lines.append(line(method, of_method, f"{shot}:{method}", "lambda 0"))
        for name in ("Ours+", "Ours"):
            ours = [row for row in rows if row["piece"] == "erasure" and (row["variant"], row["rho"]) == (name, rho)]
            if ours:
                refused = sum(bool(row["refused"]) for row in ours)
                lines.append(line(name, ours, f"{shot}:{name}", f"{refused} of {len(ours)} refused"))
    return lines


def _report(scenario: str, nets: tuple[Net, ...], title: str) -> Callable[[list[Row], Path], str]:
    def report(rows: list[Row], folder: Path) -> str:
        by_arch = {net.arch: net for net in nets}
        parts = [title]
        for arch in dict.fromkeys(row["arch"] for row in rows):
            net, of_arch = by_arch.get(arch), [row for row in rows if row["arch"] == arch]
            paper = (net or nets[-1]).paper or {}  # at the paper's scale: the values of the last network
            about = SHARED if net and net.shared else OWN
            seeds = sorted({row["seed"] for row in of_arch})
            parts.append(f"**{arch}**, seeds {seeds}. {about}")
            columns = [arch, "paper: D_r", "D_r", "paper: D_e", "D_e", ""]
            parts.append(table(columns, _lines(of_arch, scenario, paper)))
        return "\n\n".join(parts) + NOTE

    return report


SHARED = (
    "All seeds share one classifier and one inverter; they differ in the draw of D_e,rho and in relearning. Each "
    "baseline is computed once."
)
OWN = "Each seed has its own classifier, inverter and draw of D_e,rho."
NOTE = (
    "\nAccuracy on the test split in percent. The paper's oracle is fine-tuned from the original; the paper does "
    "not say for how many epochs. `refused` counts results that the gate would reject; they are included here. "
    "Fisher sees all of D_r. EUBO and RKL start from a posterior of the last layer that was learned on all training "
    "data. Ours+ draws D' from a conditional GAN that was trained on all training data. Ours sees no training data "
    "but the given samples. Fisher_1 is the smallest of the swept strengths that moves D_e by a point while D_r "
    "stays within five, else the largest that keeps D_r there. Fisher_2 is the smallest that erases D_e (5 % or "
    "less of a class, 90 % or more of the crossed sevens right).\n"
)

_TABLE2A: PaperValues = {
    "Original": ("99.47", "99.31"), "Oracle": ("99.51", "0.46"),
    "full:Fisher_1": ("96.56 ± 1.39", "98.12 ± 1.15"), "full:Fisher_2": ("13.68 ± 5.65", "0.76 ± 1.70"),
    "full:EUBO": ("29.61 ± 1.16", "0.00 ± 0.00"), "full:RKL": ("97.62 ± 0.37", "75.53 ± 3.32"),
    "full:Ours+": ("99.26 ± 0.11", "0.06 ± 0.08"), "full:Ours": ("99.06 ± 0.28", "0.81 ± 1.58"),
    "few:Fisher_1": ("96.62 ± 1.30", "98.12 ± 1.18"), "few:Fisher_2": ("20.04 ± 6.66", "0.62 ± 1.39"),
    "few:EUBO": ("35.67 ± 1.51", "0.00 ± 0.00"), "few:RKL": ("97.57 ± 0.17", "75.46 ± 4.36"),
    "few:Ours+": ("99.43 ± 0.07", "0.08 ± 0.07"), "few:Ours": ("98.43 ± 0.92", "0.18 ± 0.27"),
}  # fmt: skip
_TABLE2B: PaperValues = {
    "Original": ("98.68", "37.96"), "Oracle": ("99.54", "100.00"),
    "full:Fisher_1": ("99.66 ± 0.05", "39.70 ± 4.55"),
    "full:EUBO": ("18.81 ± 0.80", "0.00 ± 0.00"), "full:RKL": ("97.29 ± 0.46", "93.30 ± 2.68"),
    "full:Ours+": ("99.17 ± 0.14", "97.81 ± 1.66"), "full:Ours": ("99.06 ± 0.28", "96.94 ± 2.40"),
    "few:Fisher_1": ("99.66 ± 0.05", "38.54 ± 4.97"),
    "few:EUBO": ("36.96 ± 0.53", "0.00 ± 0.00"), "few:RKL": ("97.20 ± 0.16", "91.36 ± 1.35"),
    "few:Ours+": ("98.97 ± 0.12", "97.52 ± 1.19"), "few:Ours": ("99.27 ± 0.08", "97.52 ± 1.50"),
}  # fmt: skip
_TABLE4A: PaperValues = {
    "Original": ("99.31", "99.20"), "Oracle": ("99.34", "0.00"),
    "full:Ours+": ("98.80 ± 0.04", "0.44 ± 0.39"), "full:Ours": ("98.46 ± 0.39", "0.12 ± 0.07"),
    "few:Ours+": ("98.74 ± 0.15", "0.32 ± 0.25"), "few:Ours": ("98.41 ± 0.32", "0.60 ± 0.22"),
}  # fmt: skip
_TABLE4B: PaperValues = {
    "Original": ("99.19", "72.26"), "Oracle": ("99.36", "95.62"),
    "full:Ours+": ("82.16 ± 1.57", "98.39 ± 0.29"), "full:Ours": ("89.26 ± 3.70", "98.69 ± 0.29"),
    "few:Ours+": ("98.62 ± 0.07", "93.28 ± 3.24"), "few:Ours": ("98.44 ± 0.24", "95.33 ± 3.12"),
}  # fmt: skip
_TABLE4C: PaperValues = {
    "Original": ("99.24", "99.41"), "Oracle": ("99.32", "0.00"),
    "full:Ours+": ("98.99 ± 0.12", "0.00 ± 0.00"), "full:Ours": ("98.77 ± 0.40", "0.02 ± 0.04"),
    "few:Ours+": ("99.03 ± 1.13", "0.00 ± 0.00"), "few:Ours": ("98.89 ± 0.32", "0.32 ± 0.32"),
}  # fmt: skip
_TABLE4D: PaperValues = {
    "Original": ("99.19", "17.52"), "Oracle": ("99.72", "100.00"),
    "full:Ours+": ("98.35 ± 0.46", "98.54 ± 1.13"), "full:Ours": ("98.27 ± 0.43", "98.54 ± 0.46"),
    "few:Ours+": ("98.98 ± 0.19", "98.98 ± 0.36"), "few:Ours": ("98.64 ± 0.53", "96.50 ± 1.87"),
}  # fmt: skip


def _table(scenario: str, nets: tuple[Net, ...], large: str, baselines: bool, title: str) -> Table:
    return Table(_cells(scenario, nets, large, baselines), _report(scenario, nets, title))


_FIGURE6: PaperValues = {
    "Original": ("93.24", "96.10"), "Oracle": ("93.47", "2.40"),
    "full:Fisher_1": ("91.80 ± 0.42", "95.80 ± 0.57"), "full:Fisher_2": ("13.60 ± 2.52", "0.00 ± 0.00"),
    "full:EUBO": ("12.26 ± 0.65", "0.00 ± 0.00"), "full:RKL": ("87.33 ± 0.15", "70.04 ± 2.85"),
    "full:Ours+": ("89.61 ± 0.49", "0.00 ± 0.00"), "full:Ours": ("88.73 ± 0.54", "0.32 ± 0.28"),
    "few:Fisher_1": ("91.73 ± 0.41", "95.78 ± 0.63"), "few:Fisher_2": ("13.60 ± 4.51", "0.00 ± 0.00"),
    "few:EUBO": ("24.46 ± 0.48", "0.01 ± 0.00"), "few:RKL": ("87.23 ± 0.07", "68.50 ± 2.93"),
    "few:Ours+": ("89.79 ± 0.29", "0.00 ± 0.00"), "few:Ours": ("88.52 ± 0.32", "0.52 ± 0.17"),
}  # fmt: skip


def _figure6() -> Table:
    """The table, and a picture of the inverter's samples."""
    nets = (Net("preactresnet18:16", True, _FIGURE6),)
    title = (
        "Trucks of CIFAR-10: D_e is better low.\n\n![samples](figure6.png)\n\n"
        "A column for each class, with its first samples."
    )
    cells, report = _cells("truck", nets, "preactresnet18", True), _report("truck", nets, title)

    def with_samples(scale: Scale, seeds: int) -> list[Work]:
        original = images.classifier("truck", nets[0].arch if scale == "small" else "preactresnet18", 0, scale)
        return [*cells(scale, seeds), samples(images.inverter(original, scale))]

    def with_picture(rows: list[Row], folder: Path) -> str:
        (drawn,) = (row for row in rows if row["piece"] == "samples")
        (folder / "figure6.png").write_bytes(drawn["png"])
        return report([row for row in rows if row is not drawn], folder)

    return Table(with_samples, with_picture)


_CLASS, _CROSSED = "Class 9 of MNIST: D_e is better low.", "The crossed sevens of MNIST: D_e is better high."
TABLES = {
    "table2a": _table("class9", (Net("lenet5", False, _TABLE4A), Net("preactresnet18:8", True, _TABLE2A)),
                      "preactresnet18", True, _CLASS),
    "table2b": _table("crossed7", (Net("lenet5", False, _TABLE4B), Net("preactresnet18:8", True, _TABLE2B)),
                      "preactresnet18", True, _CROSSED),
    "figure6": _figure6(),
    "table4a": _table("class9", (Net("lenet5", False, _TABLE4A),), "lenet5", False, _CLASS),
    "table4b": _table("crossed7", (Net("lenet5", False, _TABLE4B),), "lenet5", False, _CROSSED),
    "table4c": _table("class9", (Net("resnet50:8", True, _TABLE4C),), "resnet50", False, _CLASS),
    "table4d": _table("crossed7", (Net("resnet50:8", True, _TABLE4D),), "resnet50", False, _CROSSED),
}  # fmt: skip
