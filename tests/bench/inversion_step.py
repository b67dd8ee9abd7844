"""Seconds of an inversion step as built against a plain form of the same step.

    python -m tests.bench.inversion_step [--arch lenet5] [--steps 20] [--device cuda]

Plain: float32, contiguous tensors, an enlarged copy before each convolution, one classifier pass for each view. Both
forms take turns, step by step, so that a busy machine slows both. With --device it times a step of training (`fit`) and
a step of inversion (`invert`) on that device instead; on a GPU these are replayed CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fsu_ray.method import invert
from fsu_ray.method.augment import random_view, seeded
from fsu_ray.method.fit import TrainingSchedule, fit
from fsu_ray.method.precision import repeatable
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator, UpsampledConv
from fsu_ray.models.hooks import observe
from fsu_ray.recipes import InvertRecipe
from fsu_ray.records import ModelSpec


class PlainConv(UpsampledConv):
    """The same layer in its usual form: enlarge, then convolve."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2), self.weight, self.bias, padding=1)


class PlainGenerator(Generator):
    """The same generator with plain layers, in the default memory format."""

    def __init__(self, spec: ModelSpec, width: int, latent: int) -> None:
        super().__init__(spec, width, latent)
        for name in ("conv1", "conv2"):
            layer = getattr(self, name)
            setattr(self, name, PlainConv(layer.in_channels, layer.out_channels))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        condition = F.one_hot(y, self.classes).to(z.dtype)
        x = self.linear(torch.cat((z, condition), 1)).view(-1, 8 * self.width, self.rows, self.columns)
        x = F.leaky_relu(self.bn1(self.conv1(self.bn0(x))), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        return torch.sigmoid(self.conv3(x))


def plain_losses(classifier: Classifier, generator: Generator, recipe: InvertRecipe, step: int) -> dict[str, Tensor]:
    """`invert.losses` in the plain form: the same draws and, up to rounding, the same values."""
    k = classifier.spec.classes
    per_class = max(2, recipe.batch // k)
    n = per_class * k
    rng = seeded(recipe.seed, step)
    z = torch.randn((n, recipe.latent), generator=rng)
    y = torch.arange(k).repeat_interleave(per_class)
    pixels = generator(z, y)
    with observe(classifier) as observed:
        logits = classifier(pixels)
    assert observed.features is not None
    views = [classifier(random_view(pixels, rng, classifier.spec.flip)) for _ in range(recipe.views)]
    probabilities = torch.stack([view.softmax(1) for view in views]) if views else logits.new_zeros((0, n, k))
    squared = recipe.form == "squared"
    return {
        "bn": invert.bn_loss(observed.statistics, recipe.form),
        "entropy": invert.entropy_loss(logits, y),
        "augmentation": invert.augmentation_loss(logits.softmax(1), probabilities, squared),
        "diversity": invert.diversity_loss(z, observed.features, k),
        "tv": invert.tv_loss(pixels, squared),
    }


def compare(spec: ModelSpec, recipe: InvertRecipe, steps: int) -> tuple[float, float]:
    """Median seconds of a step with backward pass and update: (plain, as built)."""
    torch.manual_seed(0)
    plain_classifier = Classifier(spec).eval().requires_grad_(False)
    classifier = Classifier(spec).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    plain, built = PlainGenerator(spec, recipe.width, recipe.latent), invert.begin(classifier, recipe).generator
    weights = recipe.weights.model_dump()
    times: tuple[list[float], list[float]] = ([], [])
    forms = ((plain, plain_classifier, plain_losses), (built, classifier, invert.losses))
    optimisers = [torch.optim.Adam(form[0].parameters(), lr=recipe.lr, betas=recipe.betas) for form in forms]
    for step in range(steps + 2):
        for (generator, teacher, losses), optimiser, seconds in zip(forms, optimisers, times, strict=True):
            started = time.perf_counter()
            values = losses(teacher, generator, recipe, step)
            optimiser.zero_grad(set_to_none=True)
            torch.stack([weights[name] * value for name, value in values.items()]).sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def pace(spec: ModelSpec, recipe: InvertRecipe, device: torch.device) -> tuple[float, float]:
    """Mean seconds of a training step (128 samples) and of an inversion step on `device`, over the `recipe.steps` steps
    of a second run."""
    repeatable()
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (128 * recipe.steps, *spec.shape), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, spec.classes, (len(pixels),), generator=rng)
    classifier = Classifier(spec).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def seconds(run: Callable[[], object]) -> float:
        for _ in range(2):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / recipe.steps

    trained = seconds(lambda: fit(classifier, pixels, labels, TrainingSchedule(epochs=1, precision=recipe.precision)))
    return trained, seconds(lambda: invert.invert(classifier, recipe, invert.begin(classifier, recipe)))


def main() -> None:
    """Print both times and their ratio, or the times on a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="lenet5")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto", help="of the form as built")
    parser.add_argument("--width", type=int, default=8, help="of the generator (n in the paper)")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU on this machine; leave out --device cuda")
    spec = ModelSpec(arch=options.arch, channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.3,))
    recipe = InvertRecipe(batch=options.batch, precision=options.precision, width=options.width, steps=options.steps)
    print(
        f"{options.arch}, batch {options.batch}, n = {options.width}, 2 views, {torch.get_num_threads()} threads, "
        f"{options.precision}"
    )
    if options.device:
        trained, inverted = pace(spec, recipe, torch.device(options.device))
        print(f"{options.device}: a step of training {1000 * trained:.2f} ms, of inversion {1000 * inverted:.2f} ms")
        return
    plain, built = compare(spec, recipe, options.steps)
    print(f"plain {1000 * plain:.0f} ms, as built {1000 * built:.0f} ms: {plain / built:.2f} times faster")


if __name__ == "__main__":
    main()
