"""Table 5: unlearning a classifier by the generator of another one, and whether the gate predicts the failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fsu_ray.experiments import images
from fsu_ray.experiments.catalogue import Row, Scale, Table, Work
from fsu_ray.experiments.comparison import ERASED
from fsu_ray.experiments.images import FEW
from fsu_ray.experiments.markdown import spread, table

NETS: dict[Scale, dict[str, tuple[str, int]]] = {
    "small": {
        "ResNet-18_1": ("preactresnet18:8", 0),
        "ResNet-18_2": ("preactresnet18:8", 1),
        "LeNet5": ("lenet5", 0),
        "ResNet-50": ("resnet50:8", 0),
    },
    "paper": {
        "ResNet-18_1": ("preactresnet18", 0),
        "ResNet-18_2": ("preactresnet18", 1),
        "LeNet5": ("lenet5", 0),
        "ResNet-50": ("resnet50", 0),
    },
}
"""The four classifiers: a network and a seed."""
HARM = 1.0
"""An erasure that loses more points of D_r has failed, even if D_e is erased."""
PAPER: dict[str, dict[str, tuple[str, ...]]] = {
    "class9": {
        "ResNet-18_1": ("98.43 / 0.18", "99.38 / 0.06", "98.56 / 0.30", "99.32 / 0.16"),
        "ResNet-18_2": ("98.53 / 0.00", "99.15 / 0.00", "98.14 / 2.81", "98.97 / 0.00"),
        "LeNet5": ("98.19 / 0.06", "99.36 / 0.24", "98.41 / 0.60", "99.28 / 0.16"),
        "ResNet-50": ("99.20 / 31.42", "99.26 / 40.63", "98.22 / 12.37", "98.89 / 0.32"),
    },
    "crossed7": {
        "ResNet-18_1": ("99.27 / 97.52", "99.14 / 99.85", "83.04 / 99.42", "97.79 / 99.85"),
        "ResNet-18_2": ("99.30 / 94.89", "98.56 / 98.83", "98.49 / 82.63", "99.21 / 97.23"),
        "LeNet5": ("99.44 / 94.60", "99.21 / 99.27", "98.44 / 95.33", "99.10 / 100.00"),
        "ResNet-50": ("99.34 / 96.06", "99.42 / 100.00", "97.45 / 99.27", "98.64 / 96.50"),
    },
}
"""The paper's D_r / D_e: by generator, then by classifier in the order of `NETS`."""


def _cells(scenario: str) -> Callable[[Scale, int], list[Work]]:
    def cells(scale: Scale, seeds: int) -> list[Work]:
        works: list[Work] = []
        nets = {name: images.classifier(scenario, *net, scale) for name, net in NETS[scale].items()}
        for source, inverted in nets.items():
            inverter = images.inverter(inverted, scale)
            for target, original in nets.items():
                drawn = images.dataset(inverter, {}, original)
                for seed in range(seeds):
                    kind, cell = images.erasure(drawn, FEW, {}, seed)
                    works.append((kind, {**cell, "variant": f"{source} > {target}"}))
        return works

    return cells


def failed(row: Row) -> bool:
    """Whether an erasure has failed: D_e is not erased, or D_r has lost more than `HARM`."""
    return not ERASED[row["scenario"]](row["D_e"]) or row["D_r"] < row["before_D_r"] - HARM


def _both(rows: list[Row]) -> str:
    return f"{spread(row['D_r'] for row in rows)} / {spread(row['D_e'] for row in rows)}"


def _report(scenario: str) -> Callable[[list[Row], Path], str]:
    def report(rows: list[Row], folder: Path) -> str:
        names = list(PAPER[scenario])
        pairs = dict.fromkeys(row["variant"] for row in rows)
        by_pair = {pair: [row for row in rows if row["variant"] == pair] for pair in pairs}
        before = [by_pair[f"{name} > {name}"][0] for name in names]
        first = ["Original", *(f"{row['before_D_r']:.2f} / {row['before_D_e']:.2f}" for row in before)]
        lines, paper = [first], []
        for source in names:
            of_source = [by_pair[f"{source} > {target}"] for target in names]
            lines.append([source, *map(_both, of_source)])
            paper.append([source, *PAPER[scenario][source]])
        gate = [
            [pair, f"{runs[0]['acceptance']:.3f}", f"{runs[0]['coverage']:.2f}", runs[0]["generator"] or "accepts",
             _both(runs), f"{sum(map(failed, runs))} of {len(runs)}"]
            for pair, runs in by_pair.items()
        ]  # fmt: skip
        fails = {pair: sum(map(failed, runs)) * 2 > len(runs) for pair, runs in by_pair.items()}
        refused = {pair: bool(runs[0]["generator"]) for pair, runs in by_pair.items()}
        right = sum(refused[pair] == fails[pair] for pair in pairs)
        caught, needless = (sum(refused[pair] for pair in pairs if fails[pair] is bad) for bad in (True, False))
        columns = ["generator of, by row; unlearned, by column", *names]
        return "\n\n".join([
            "D_r / D_e, 3 % of D_e given.", table(columns, lines), "The paper:", table(columns, paper),
            "The gate's decision on each generator before its reuse, and the result:",
            table(["generator > classifier", "acceptance", "coverage", "the gate", "D_r / D_e", "failed"], gate),
            f"The gate is right about {right} of {len(by_pair)} pairs, by the result of most seeds: it refuses "
            f"{caught} of the {sum(fails.values())} that failed, and {needless} of the others. Failed: D_e is not "
            "erased (5 % or less of a class, 90 % or more of the crossed sevens right) or D_r has lost more than a "
            "point. Refused pairs are measured here too; the system would train a new generator instead.\n",
        ])  # fmt: skip

    return report


TABLES = {
    "table5a": Table(_cells("class9"), _report("class9")),
    "table5b": Table(_cells("crossed7"), _report("crossed7")),
}
