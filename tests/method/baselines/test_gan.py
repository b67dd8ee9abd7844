"""Ours+: a generator trained on real images draws what it is asked for, and serves where an inverter does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fsu_ray.errors import InvalidData
from fsu_ray.method.baselines.gan import Discriminator, GanRecipe, train
from fsu_ray.models.generator import Generator
from fsu_ray.records import ModelSpec

SPEC = ModelSpec(arch="lenet5", channels=1, height=16, width=16, classes=3)
QUICK = GanRecipe(steps=250, batch=24, width=2, latent=8, critic_width=4)
CPU = torch.device("cpu")


def bars(each: int = 40) -> tuple[Tensor, Tensor]:
    """Images of three classes: a bright bar on the left, in the middle or on the right; shade and noise vary."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(each)
    pixels = torch.zeros(3 * each, 1, 16, 16)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, :, 5 * label : 5 * label + 5] = 0.6 + 0.4 * torch.rand(1, generator=rng)
    noise = 0.05 * torch.rand(pixels.shape, generator=rng)
    return ((pixels + noise).clamp(0, 1) * 255).byte(), labels


@torch.no_grad()
def drawn(generator: Generator, each: int = 50) -> tuple[Tensor, Tensor]:
    labels = torch.arange(SPEC.classes).repeat_interleave(each)
    z = torch.randn(len(labels), generator.latent, generator=torch.Generator().manual_seed(1))
    return generator(z, labels), labels


def test_samples_are_like_the_images_of_their_class() -> None:
    """Nearest to the mean image of the class that was asked for, and nearer than another class's own images are."""
    pixels, labels = bars()
    generator = train(SPEC, pixels, labels, QUICK, CPU)
    samples, asked = drawn(generator)
    real = pixels.float() / 255
    means = torch.stack([real[labels == k].mean(0).flatten() for k in range(3)])
    far = torch.cdist(samples.flatten(1), means)
    assert (far.argmin(1) == asked).float().mean() > 0.95
    apart = torch.cdist(means, means)[~torch.eye(3, dtype=torch.bool)].min()
    assert far.gather(1, asked[:, None]).mean() < apart / 2
    assert 0 <= samples.min() <= samples.max() <= 1
    assert not generator.training


def test_one_seed_one_generator() -> None:
    """Whatever was drawn before; another seed gives another one."""
    pixels, labels = bars(4)
    subset_forget = GanRecipe(steps=3, batch=8, width=2, latent=4, critic_width=4)
    found = []
    for seed in (0, 0, 1):
        torch.rand(5)
        found.append(
            train(SPEC, pixels, labels, GanRecipe(**{**subset_forget.__dict__, "seed": seed}), CPU).state_dict()
        )
    same = [all(torch.equal(found[0][name], other[name]) for name in found[0]) for other in found]
    assert same == [True, True, False]
    fresh = Generator(SPEC, 2, 4).state_dict()
    assert {name: t.shape for name, t in found[0].items()} == {name: t.shape for name, t in fresh.items()}


def test_progress_is_told() -> None:
    """Every ten steps and at the end, with both losses."""
    pixels, labels = bars(4)
    heard: list[tuple[int, int, set[str]]] = []
    recipe = GanRecipe(steps=13, batch=6, width=2, latent=4, critic_width=4)
    train(SPEC, pixels, labels, recipe, CPU, lambda step, steps, losses: heard.append((step, steps, set(losses))))
    names = {"discriminator", "generator"}
    assert heard == [(10, 13, names), (13, 13, names)]


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (20, 12, 3), (32, 32, 3)])
def test_the_discriminator_takes_any_size(height: int, width: int, channels: int) -> None:
    """One logit a class."""
    spec = ModelSpec(arch="lenet5", channels=channels, height=height, width=width, classes=4)
    assert Discriminator(spec, 4)(torch.rand(2, *spec.shape)).shape == (2, 4)


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(3, 1, 16, 16), torch.arange(3)),
        (torch.zeros(3, 1, 32, 32, dtype=torch.uint8), torch.arange(3)),
        (torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.arange(2)),
        (torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, 1])),
        (torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.arange(4)),
    ],
    ids=["floats", "size", "labels missing", "class missing", "class too many"],
)
def test_data_that_do_not_fit(pixels: Tensor, labels: Tensor) -> None:
    with pytest.raises(InvalidData, match="a GAN of this model"):
        train(SPEC, pixels, labels, QUICK, CPU)
