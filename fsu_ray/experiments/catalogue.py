"""The paper's tables and figures by name, and what the runner (`experiments.reproduce`) has to know about each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fsu_ray.errors import NotFound
from fsu_ray.work import BlobStore

Scale = Literal["small", "paper"]
Cell = dict[str, Any]
"""A unit of work: every number and word that decides its result, with a `seed`. JSON-serialisable."""
Row = dict[str, Any]
"""A row of results. It is flat, so that Parquet can hold it."""
BLOBS = ("weights", "dataset")
"""The columns of a row that hold the digests of blobs that other cells need."""
Work = tuple[str, Cell]
"""The name of a cell type, and a cell of that type."""


@dataclass(frozen=True)
class CellContext:
    """A cell's device, the store for blobs that other cells need, and the rows of each cell that the cell needs."""

    device: torch.device
    store: BlobStore
    needs: list[list[Row]]


@dataclass(frozen=True)
class CellType:
    """How cells of one type are computed: `run` returns a cell's rows.

    Each cell runs in its own process with `cpus` CPUs; with `gpu` it gets a GPU where the cluster has one. `needs`
    lists the cells that must be computed before.
    """

    run: Callable[[Cell, CellContext], list[Row]]
    needs: Callable[[Cell], list[Work]] = lambda cell: []
    cpus: int = 1
    gpu: bool = False


@dataclass(frozen=True)
class Table:
    """A table or figure: `cells(scale, seeds)` lists its cells; `report(rows, folder)` returns Markdown and writes
    pictures to the folder."""

    cells: Callable[[Scale, int], list[Work]]
    report: Callable[[list[Row], Path], str]


NAMES: dict[str, tuple[str, str]] = {
    "figure2": ("moons", "decision maps on the moons: original, oracle, EUBO, RKL, Ours"),
    "figure3": ("moons", "KL to the oracle against rho on the moons: Ours, EUBO, RKL"),
    "figure4a": ("pictures", "sorted distances of D' to the given samples, and thresholds (LeNet5)"),
    "figure4b": ("pictures", "samples of D', those that the filter takes in boxes (LeNet5)"),
    "figure4c": ("pictures", "samples of an inverter that was trained without the BN loss (LeNet5)"),
    "figure5": ("tuning", "D_r and D_e by rho, Ours and a tuned EUBO (LeNet5)"),
    "figure6": ("comparison", "CIFAR-10's trucks by every method, and samples (PreActResNet-18 of width 16)"),
    "figure7": (
        "figures_7_8",
        "time of training, generator and unlearning, first and later requests (LeNet5, PreActResNet-18)",
    ),
    "figure8": ("figures_7_8", "D_r against D_e by Fisher's lambda, with Ours and the oracles (LeNet5)"),
    "figure9": ("pictures", "samples of the inverters of LeNet5 and ResNet-50"),
    "figure10": ("pictures", "samples of inverters without augmentation, diversity, total variation (LeNet5)"),
    "sequence": ("sequences", "five requests, one generator against one each, with probes and without (LeNet5)"),
    "table1": ("moons", "KL to original and oracle on the moons, rho .25, by lambda"),
    "table2a": ("comparison", "MNIST class 9 by every method (LeNet5; PreActResNet-18 of width 8)"),
    "table2b": ("comparison", "MNIST's crossed sevens by every method (LeNet5; PreActResNet-18 of width 8)"),
    "table3": ("ablations", "MNIST class 9 by the entropy threshold t_ent (LeNet5)"),
    "table4a": ("comparison", "MNIST class 9, Ours and Ours+ (LeNet5)"),
    "table4b": ("comparison", "MNIST's crossed sevens, Ours and Ours+ (LeNet5)"),
    "table4c": ("comparison", "MNIST class 9, Ours and Ours+ (ResNet-50 of width 8)"),
    "table4d": ("comparison", "MNIST's crossed sevens, Ours and Ours+ (ResNet-50 of width 8)"),
    "table5a": ("transfer", "MNIST class 9: the generators of four classifiers, each for each"),
    "table5b": ("transfer", "MNIST's crossed sevens: the generators of four classifiers, each for each"),
    "table6": ("ablations", "MNIST class 9 without each loss of the inversion (LeNet5)"),
    "table6bn": ("ablations", "MNIST class 9 without the BN loss, by our filter and the paper's (LeNet5, deep)"),
    "table7": ("ablations", "MNIST class 9 by the distance metric of the filter (LeNet5)"),
}
"""By name: the module whose TABLES hold it, and a description."""

CELL_TYPES: dict[str, str] = {
    "moons-maps": "moons",
    "moons-by-rho": "moons",
    "moons-ours": "moons",
    "moons-bayes": "moons",
    "classifier": "images",
    "oracle": "images",
    "fisher": "images",
    "generator": "images",
    "gan": "images",
    "dataset": "images",
    "erasure": "images",
    "samples": "pictures",
    "filtered": "pictures",
    "sequence": "sequences",
    "bayes": "bayes",
}
"""By cell type: the module whose CELL_TYPES hold it."""


def find(name: str) -> Table:
    """The table or figure of that name; raises NotFound."""
    if name not in NAMES:
        similar = [known for known in NAMES if name and known.startswith(name)]
        advice = f"take {', '.join(similar)}" if similar else "`fsu reproduce list` prints their names"
        raise NotFound(f"no table or figure {name!r}: {advice}")
    table: Table = importlib.import_module(f"fsu_ray.experiments.{NAMES[name][0]}").TABLES[name]
    return table


def find_cell_type(kind: str) -> CellType:
    """The cell type of that name."""
    cell_type: CellType = importlib.import_module(f"fsu_ray.experiments.{CELL_TYPES[kind]}").CELL_TYPES[kind]
    return cell_type
