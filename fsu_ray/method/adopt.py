"""A generator from elsewhere becomes one of a line: D' is drawn from it and labelled, outside of any request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fsu_ray.errors import InvalidWeights
from fsu_ray.method.context import classes_of
from fsu_ray.method.masking import MaskedDataset, StaticMaskInputs
from fsu_ray.method.obtain import figures_of
from fsu_ray.method.reading import read_generator
from fsu_ray.method.synthesize import synthesize
from fsu_ray.models.networks import Classifier
from fsu_ray.recipes import Recipe
from fsu_ray.work import BlobStore, WorkOrder


@dataclass(frozen=True)
class Adopted:
    """The digests of a generator's weights and of its D', and the figures that the gate judges them by."""

    weights: str
    dataset: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _Line(StaticMaskInputs):
    """A line with its current version, which the figures of D' are about."""

    current: Classifier
    recipe: Recipe
    gone: list[int]


def adopt(
    store: BlobStore,
    order: WorkOrder,
    weights: bytes,
    latent: int | None,
    device: torch.device,
    on_progress: Any = None,
) -> Adopted:
    """Draw D' from the generator with these `weights` by the recipe of `order`, have the root label it, and measure
    what a gate would see under the masks in force. `tell(done, total, figures)` hears of the drawing.

    Raises InvalidWeights where the weights do not fit the model (see `read_generator`), or where the root trusts
    nothing that the generator draws: nothing is written then.
    """
    spec, recipe = order.spec, order.recipe
    generator = read_generator(spec, weights, latent).to(device)
    teacher, current = (
        Classifier.from_bytes(spec, store.get(digest)).to(device)
        for digest in (order.root_weights, order.current_weights)
    )
    dataset, drawn = synthesize(teacher, generator, recipe.synthesize, on_progress)
    if not len(dataset):
        raise InvalidWeights(
            "nothing that the generator draws passes the tests of eq. 8: the model does not know what it sees; "
            "import a generator of data like those that it was trained on"
        )
    gone = classes_of(order.earlier_erasures)
    line = _Line(store, teacher, order.earlier_erasures, spec.classes, current, recipe, gone)
    digest = store.put(dataset.to_bytes())
    metrics = figures_of(line, MaskedDataset(line, dataset, digest), drawn)
    return Adopted(store.put(weights), digest, metrics)
