"""Figures 4, 9 and 10: what a picture shows, and that boxes and thresholds are the filter's own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fsu_ray.experiments import images, pictures
from fsu_ray.experiments.mnist import Bench
from fsu_ray.method.synthesize import Synthetic

INVERT = {"steps": 60, "batch": 60, "width": 4, "weights": {"entropy": 10.0}}
SYNTHESIZE = {"per_class": 20, "entropy_threshold": 2.3, "max_draws": 8, "starved_below": 0.0}


def pixels_of(png: bytes) -> np.ndarray:
    """(height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_grid_puts_every_image_in_its_place() -> None:
    """Enlarged, with white between, a box around the one that has one."""
    shades = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 4) * 40
    picture = pixels_of(pictures.grid(shades, 2, {(1, 2): (200, 10, 20)}))
    assert picture.shape == (2 * 11 + 3, 3 * 11 + 3, 3)
    for row in range(2):
        for column in range(3):
            inside = picture[3 + 11 * row : 11 + 11 * row, 3 + 11 * column : 11 + 11 * column]
            assert (inside == 40 * (3 * row + column)).all()
    assert (picture[11 + 3, 22 + 4] == 255).all() or (picture[12, 25] == (200, 10, 20)).all()
    assert (picture[:3] == 255).all()
    assert (picture[12:25, 23:25] == (200, 10, 20)).all()
    assert (picture[:, :3] == 255).all()


@pytest.mark.mnist
def test_what_the_filter_takes_is_in_a_box(part: Bench, store: Any, make: Any, tmp_path: Path) -> None:
    """By both policies: the threshold stands among the sorted distances; a class's nearest samples are taken."""
    original = {**images.classifier("class9", "lenet5", 1, "small"), "epochs": 4}
    drawn = images.dataset(images.generator(original, INVERT), SYNTHESIZE)
    rows = []
    for policy in ("leave-one-out", "knee"):
        recipe = pictures.FilterRecipe(policy=policy).model_dump(mode="json")
        rows.append(make("filtered", {"dataset": drawn, "rho": 0.2, "filter": recipe, "seed": 1}))
    size = len(Synthetic.from_bytes(store.get(make("dataset", drawn)["dataset"])))
    for row in rows:
        assert row["distances"] == sorted(row["distances"])
        assert len(row["distances"]) == size
        assert row["alone"] == sum(each <= row["threshold"] for each in row["distances"]) >= row["taken"] > 0
        assert row["predicted"][9] == row["taken"] == sum(row["predicted"])
        coloured = pixels_of(row["png"]).reshape(-1, 3)
        assert ((coloured[:, 0] == 235) & (coloured[:, 2] == 40)).any()
    assert rows[1]["threshold"] <= rows[0]["threshold"]
    text = pictures.TABLES["figure4a"].report(rows, tmp_path) + pictures.TABLES["figure4b"].report(rows, tmp_path)
    assert f"| 1 | knee | {rows[1]['threshold']:.3f} | {rows[1]['alone']} | {rows[1]['taken']} | {size} |" in text
    assert {file.name for file in tmp_path.iterdir()} == {
        "figure4a.png", "figure4b.knee.png", "figure4b.leave-one-out.png"
    }  # fmt: skip


@pytest.mark.mnist
def test_a_column_a_class(part: Bench, make: Any, tmp_path: Path) -> None:
    """Ten samples of each class as they are drawn, and how many of them are what was asked for."""
    original = {**images.classifier("class9", "lenet5", 1, "small"), "epochs": 4}
    row = make(*pictures.samples(images.generator(original, {**INVERT, "steps": 120}), "tv"))
    assert 0.3 < row["right"] <= 1
    assert pixels_of(row["png"]).shape == (10 * 67 + 3, 10 * 67 + 3, 3)
    text = pictures.TABLES["figure10"].report([row], tmp_path)
    assert "figure10.tv.png" in text
    assert (tmp_path / "figure10.tv.png").read_bytes() == row["png"]


def test_each_picture_has_the_inverter_that_it_names() -> None:
    """Without the loss that is named, and with all others; both networks of Figure 9."""
    for name, losses in (("figure4c", ["bn"]), ("figure10", ["augmentation", "diversity", "tv"])):
        cells = [cell for _, cell in pictures.TABLES[name].cells("small", 3)]
        assert [cell["without"] for cell in cells] == losses
        for cell in cells:
            weights = cell["generator"]["invert"]["weights"]
            assert [loss for loss, weight in weights.items() if weight == 0] == [cell["without"]]
    arches = [cell["generator"]["classifier"]["arch"] for _, cell in pictures.TABLES["figure9"].cells("paper", 1)]
    assert arches == ["lenet5", "resnet50"]
