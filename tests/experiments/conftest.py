"""A part of MNIST; cells computed in this process, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.experiments import images
from fsu_ray.experiments.catalogue import Cell, CellContext, Row, Work, find_cell_type
from fsu_ray.experiments.mnist import Bench, read_bench
from fsu_ray.experiments.reproduce import _key

PART = 3000


@pytest.fixture
def part(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The first 3,000 images of each split."""
    whole = read_bench(mnist)
    first = torch.arange(PART)
    crossed = (places[places < PART] for places in (whole.crossed_train, whole.crossed_test))
    small = Bench(whole.train.take(first), whole.test.take(first), *crossed)
    monkeypatch.setattr(images, "bench", lambda data="mnist": small)
    return small


class Maker:
    """Computes cells and the cells that they need, each once."""

    def __init__(self, store: Any) -> None:
        self.store, self.made = store, dict[str, list[Row]]()

    def __call__(self, kind: str, cell: Cell) -> Row:
        """The only row of a cell."""
        (row,) = self.rows(kind, cell)
        return row

    def rows(self, kind: str, cell: Cell) -> list[Row]:
        """All rows of a cell."""
        work: Work = (kind, cell)
        if _key(work) not in self.made:
            needs = [self.rows(*need) for need in find_cell_type(kind).needs(cell)]
            self.made[_key(work)] = find_cell_type(kind).run(cell, CellContext(torch.device("cpu"), self.store, needs))
        return self.made[_key(work)]


@pytest.fixture
def make(store: Any) -> Maker:
    """A maker with an empty store."""
    return Maker(store)
