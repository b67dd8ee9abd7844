"""Synthesis: draw D', a substitute for the training data, from a generator (eq. 8, Algorithm 2).

A drawn sample belongs to D' if its entropy stays below t_ent on every view (plain, turned to either side) and the
predicted class is the same on all views. D' holds the logits of the classifier that labelled it, so a mask can remove
the probability of any class and the rest can be normalised.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fsu_ray.errors import StorageError
from fsu_ray.method.augment import rotated, seeded
from fsu_ray.method.group import Group
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator
from fsu_ray.recipes import SynthesizeRecipe
from fsu_ray.work import StepCallback

CHUNK = 250  # samples drawn at once; part of what a seed means


@dataclass(frozen=True)
class Synthetic:
    """D': pixels (N, C, H, W) uint8, logits (N, K) of the labelling version, entropy (N,) in nats (highest view),
    condition (N,) the class it was drawn for, holdout (N,) bool: never trained on."""

    pixels: Tensor
    logits: Tensor
    entropy: Tensor
    condition: Tensor
    holdout: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def predicted(self) -> Tensor:
        """(N,): the class that the labelling version predicts."""
        return self.logits.argmax(1)

    def to_bytes(self) -> bytes:
        """As Parquet: one row a sample; image as raw bytes, its shape in the file's metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        n, channels, rows, columns = self.pixels.shape
        size = channels * rows * columns
        images = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(size), n, [None, pa.py_buffer(self.pixels.contiguous().numpy().tobytes())]
        )
        logits = pa.FixedSizeListArray.from_arrays(self.logits.flatten().numpy(), self.logits.shape[1])
        table = pa.table(
            {
                "image": images,
                "logits": logits,
                "entropy": self.entropy.numpy(),
                "condition": self.condition.numpy(),
                "holdout": self.holdout.numpy(),
            }
        ).replace_schema_metadata({"shape": f"{channels},{rows},{columns}"})
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Synthetic:
        """Read what `to_bytes` wrote; raises StorageError for anything else."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(pa.BufferReader(data)).combine_chunks()
            shape = [int(v) for v in table.schema.metadata[b"shape"].split(b",")]
            width = table.schema.field("logits").type.list_size
            table = table.select(["image", "logits", "entropy", "condition", "holdout"])
        except (pa.ArrowException, OSError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"the synthetic data set cannot be read ({str(error).splitlines()[0]})") from None

        def numbers(name: str) -> Tensor:
            return torch.from_numpy(np.array(table[name].to_numpy()))

        images = np.frombuffer(b"".join(table["image"].to_pylist()), dtype=np.uint8).copy()
        logits = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return cls(
            torch.from_numpy(images).view(len(table), *shape),
            torch.from_numpy(np.array(logits)).view(len(table), width),
            numbers("entropy"),
            numbers("condition"),
            numbers("holdout"),
        )


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of softmax(logits): (N, K) -> (N,)."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


@torch.no_grad()
def trustworthy(classifier: Classifier, pixels: Tensor, recipe: SynthesizeRecipe) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 8's two tests of pixels (N, C, H, W) in [0, 1]: passed (N,) bool, logits (N, K), highest entropy (N,)."""
    views = [pixels, rotated(pixels, recipe.rotation), rotated(pixels, -recipe.rotation)]
    logits = classifier(torch.cat(views)).float()
    uncertainty = entropy(logits).view(3, -1).amax(0)
    predicted = logits.argmax(1).view(3, -1)
    passed = (uncertainty < recipe.entropy_threshold) & (predicted[1:] == predicted[0]).all(0)
    return passed, logits[: len(pixels)], uncertainty


@torch.no_grad()
def synthesize(
    classifier: Classifier,
    generator: Generator,
    recipe: SynthesizeRecipe,
    on_step: StepCallback | None = None,
    group: Group | None = None,
) -> tuple[Synthetic, dict[str, Any]]:
    """Draw D' with `per_class` samples for each class the generator is conditioned on, labelled by `classifier`.

    A class that does not reach `per_class` within `max_draws * per_class` draws has fewer samples. Returns D' and the
    metrics `acceptance` (share of the draws that pass, a list by class) and `count` (samples of D' by predicted class).
    `on_step` hears of the samples of the rarest class so far. In each round one chunk is drawn for every class that
    lacks samples; the ranks of `group` share the chunks, and each ends with all of D'. Every chunk has its own seed, so
    the result does not depend on the rank that draws it.
    """
    group = group or Group()
    classifier.eval()
    generator.eval()
    k = classifier.spec.classes
    parts: list[list[Drawn]] = [[] for _ in range(k)]
    passed, rounds = [0] * k, -(-recipe.max_draws * recipe.per_class // CHUNK)
    for number in range(rounds):
        lacking = [label for label in range(k) if passed[label] < recipe.per_class]
        if not lacking:
            break
        mine = {
            label: _chunk(classifier, generator, recipe, label, number) for label in lacking[group.rank :: group.size]
        }
        drawn: dict[int, Drawn] = {}
        for part in group.everyone(mine):
            drawn |= part
        for label in lacking:
            parts[label].append(drawn[label])
            passed[label] += len(drawn[label][0])
        if on_step:
            on_step(min(*passed, recipe.per_class), recipe.per_class, {"lacking": float(len(lacking))})
    acceptance = [passed[label] / (CHUNK * len(parts[label])) for label in range(k)]
    by_class = []
    for label in range(k):
        pixels, logits, uncertainty = (
            torch.cat(column)[: recipe.per_class] for column in zip(*parts[label], strict=True)
        )
        by_class.append((pixels, logits, uncertainty, torch.full((len(pixels),), label)))
    pixels, logits, uncertainty, condition = (torch.cat(column) for column in zip(*by_class, strict=True))
    holdout = torch.rand(len(pixels), generator=seeded(recipe.seed, k)) < recipe.holdout
    dataset = Synthetic(pixels.contiguous(), logits, uncertainty, condition, holdout)
    count = torch.bincount(dataset.predicted, minlength=k).tolist()
    return dataset, {"acceptance": [round(a, 4) for a in acceptance], "count": count}


Drawn = tuple[Tensor, Tensor, Tensor]
"""Pixels, logits and entropy of the samples of a chunk that passed."""


def _chunk(classifier: Classifier, generator: Generator, recipe: SynthesizeRecipe, label: int, number: int) -> Drawn:
    """The samples of chunk `number` for class `label` that pass, on the CPU."""
    device = next(classifier.parameters()).device
    rng = seeded(recipe.seed, label, number)
    z = torch.randn((CHUNK, generator.latent), generator=rng).to(device)
    y = torch.full((CHUNK,), label, device=device)
    stored = (generator(z, y) * 255).round().byte()  # tested as the artifact stores them
    passed, logits, uncertainty = trustworthy(classifier, stored.float() / 255, recipe)
    return stored[passed].cpu(), logits[passed].cpu(), uncertainty[passed].cpu()


def starved_classes(count: list[int], recipe: SynthesizeRecipe) -> list[int]:
    """The classes of which D' holds too few samples: fewer than the share `starved_below` of `per_class`."""
    return [label for label, number in enumerate(count) if number < recipe.starved_below * recipe.per_class]
