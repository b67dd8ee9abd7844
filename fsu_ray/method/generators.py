"""Generators and their D': read from weights, reused, trained, drawn from, or adopted from elsewhere.

These are the first stages of a run. Each takes the run's inputs and returns what it made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from fsu_ray.errors import InvalidWeights, StorageError
from fsu_ray.method import invert
from fsu_ray.method.evaluate import generator_metrics
from fsu_ray.method.group import Group
from fsu_ray.method.inputs import RunInputs, whole_classes
from fsu_ray.method.masking import MaskedDataset
from fsu_ray.method.synthesize import Synthetic, starved_classes, synthesize
from fsu_ray.models.classifier import Classifier, load_weights
from fsu_ray.models.generator import Generator
from fsu_ray.recipes import SynthesizeRecipe
from fsu_ray.records import Digest, ModelSpec
from fsu_ray.work import BlobStore, GeneratorRef, StepCallback, WorkOrder


def read_generator(spec: ModelSpec, data: bytes, latent: int | None = None) -> Generator:
    """The generator with the weights `data` (safetensors of `Generator.state_dict()`), in eval mode.

    The shapes of the tensors tell its width. Its first layer takes z and one input a class, so the classes of weights
    from outside are only known where `latent`, the dimensions of z, is given. Raises InvalidWeights where the file is
    not whole, or holds the tensors of another network, another input shape or other classes than those of `spec`.
    """
    generator = Generator(spec, *_sizes(spec, data, latent))
    shape = f"{spec.channels}x{spec.height}x{spec.width}"
    load_weights(generator, data, f"a generator of {shape}", "what the model takes")
    return generator.eval()


def _sizes(spec: ModelSpec, data: bytes, latent: int | None) -> tuple[int, int]:
    """Width and latent dimensions of the generator in `data`. Any numbers where `data` is no generator: loading it
    says what is wrong."""
    try:
        tensors = load_tensors(data)
        (_, inputs), (channels, doubled, _, _) = tensors["linear.weight"].shape, tensors["conv3.weight"].shape
    except (SafetensorError, ValueError, KeyError):
        return 1, 1
    dimensions = inputs - spec.classes
    if dimensions < 1 or latent not in (None, dimensions):
        expected = "" if latent is None else f" {latent} dimensions of z and"
        advice = f"; if its z has {dimensions}, give --latent {dimensions}" if dimensions > 0 else ""
        raise InvalidWeights(f"the generator takes {inputs} inputs, not{expected} {spec.classes} classes{advice}")
    if channels != spec.channels:
        raise InvalidWeights(f"the generator draws {channels} channels, the model takes {spec.channels}")
    return max(1, doubled // 2), dimensions


def load_dataset(inputs: RunInputs, digest: str) -> MaskedDataset:
    """The stored D' `digest` under the masks in force; raises StorageError where it does not have the model's shape."""
    dataset = Synthetic.from_bytes(inputs.store.get(digest))
    if tuple(dataset.pixels.shape[1:]) != inputs.order.spec.shape:
        raise StorageError(f"data set {digest[:12]} does not have the shape of the model")
    return MaskedDataset(inputs.store, inputs.teacher, inputs.masked_erasures, dataset, digest)


def reused_metrics(inputs: RunInputs, generator: GeneratorRef, masked: MaskedDataset) -> dict[str, Any]:
    """The metrics of the D' of an existing generator for the current version, which the gate judges."""
    return dataset_metrics(
        masked, inputs.current, inputs.recipe.synthesize, inputs.erased_classes, dict(generator.metrics)
    )


def dataset_metrics(
    masked: MaskedDataset,
    current: Classifier,
    recipe: SynthesizeRecipe,
    erased_classes: Sequence[int],
    drawn: dict[str, Any],
) -> dict[str, Any]:
    """The metrics of D' for the version `current` under the masks in force (see `evaluate.generator_metrics`).

    `drawn` holds acceptance and count by class: what `synthesize` returned, or metrics that this function returned.
    """
    drawn = {
        "acceptance": drawn.get("acceptance_by_class", drawn["acceptance"]),
        "count": drawn.get("count_by_class") or drawn["count"],
    }
    starved = [label for label in starved_classes(drawn["count"], recipe) if label not in erased_classes]
    return generator_metrics(
        current, masked.dataset, drawn, masked.allowed(), masked.retained(), erased_classes, starved
    )


def warm_weights(inputs: RunInputs) -> dict[str, Tensor] | None:
    """The tensors of the older generator that a new training starts from, None where there is none."""
    warm = inputs.order.generators.warm_start
    return load_tensors(inputs.store.get(warm.weights)) if warm and inputs.store.has(warm.weights) else None


def train_generator(
    inputs: RunInputs,
    warm: dict[str, Tensor] | None,
    inversion: Mapping[str, Any] | None,
    on_step: StepCallback,
    checkpoint: Callable[[invert.Inversion], None] | None,
    every: int,
    group: Group,
) -> Digest:
    """Invert the teacher (Algorithm 1) and store the generator: its digest.

    `inversion` is the state of an interrupted inversion, None to begin from `warm` or from random weights.
    """
    run = invert.begin(inputs.teacher, inputs.recipe.invert, warm)
    if inversion is not None:
        run.restore(inversion)
    generator = invert.invert(inputs.teacher, inputs.recipe.invert, run, on_step, checkpoint, every, group)
    return group.once(lambda: inputs.store.put(generator.to_bytes()))


def draw_dataset(
    inputs: RunInputs, generator_weights: str, on_step: StepCallback, group: Group
) -> tuple[MaskedDataset, dict[str, Any]]:
    """Draw D' from a stored generator (Algorithm 2) and store it: D' under the masks in force, and its metrics."""
    generator = read_generator(inputs.order.spec, inputs.store.get(generator_weights))
    generator = generator.to(inputs.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = inputs.recipe.synthesize
    dataset, drawn = synthesize(inputs.teacher, generator, recipe, on_step, group)
    digest = group.once(lambda: inputs.store.put(dataset.to_bytes()))
    masked = MaskedDataset(inputs.store, inputs.teacher, inputs.masked_erasures, dataset, digest)
    metrics = group.once(lambda: dataset_metrics(masked, inputs.current, recipe, inputs.erased_classes, drawn))
    return masked, metrics


@dataclass(frozen=True)
class AdoptedGenerator:
    """The digests of a generator's weights and of its D', and the metrics that the gate judges them by."""

    weights: Digest
    dataset: Digest
    metrics: dict[str, Any]


def adopt(
    store: BlobStore,
    order: WorkOrder,
    weights: bytes,
    latent: int | None,
    device: torch.device,
    on_step: StepCallback | None = None,
) -> AdoptedGenerator:
    """Make a generator from elsewhere one of a model: draw D' from it and have the root label D'.

    `order` names the model's versions, its earlier erasures and the recipe; it needs no targets. Raises InvalidWeights
    where the weights do not fit the model (see `read_generator`), or where no drawn sample passes the tests of eq. 8;
    nothing is stored then.
    """
    spec, recipe = order.spec, order.recipe
    generator = read_generator(spec, weights, latent).to(device)
    teacher, current = (
        Classifier.from_bytes(spec, store.get(digest)).to(device)
        for digest in (order.root_weights, order.current_weights)
    )
    dataset, drawn = synthesize(teacher, generator, recipe.synthesize, on_step)
    if not len(dataset):
        raise InvalidWeights(
            "no sample that the generator draws passes the tests of eq. 8: the model does not recognise them; "
            "import a generator of data like those that the model was trained on"
        )
    digest = store.put(dataset.to_bytes())
    masked = MaskedDataset(store, teacher, order.earlier_erasures, dataset, digest)
    erased = whole_classes(order.earlier_erasures)
    metrics = dataset_metrics(masked, current, recipe.synthesize, erased, drawn)
    return AdoptedGenerator(store.put(weights), digest, metrics)
