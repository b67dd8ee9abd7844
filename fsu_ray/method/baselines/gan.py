"""Ours+ (section 4.1): the generator trained as a GAN on the real data, in the place of the inverter.

The generator is that of an inversion, `models.generator.Generator`, so its weights serve wherever an inverter's do. The
discriminator is a small convolutional network with a projection of the class (Miyato and Koyama, ICLR 2018), and
matching-aware (Reed et al., ICML 2016): a real image with a class that is not its own is to be told apart as well,
which costs a product of vectors and makes the generator mind its condition from the first steps on. Losses are the
non-saturating ones of Goodfellow et al. 2014, as binary cross entropies. It needs the training data: say so in a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsu_ray.errors import InvalidData
from fsu_ray.method.augment import seeded
from fsu_ray.method.cuda_graph import CudaGraphStep
from fsu_ray.method.group import Group
from fsu_ray.method.invert import decay
from fsu_ray.method.precision import autocast, resolve_precision
from fsu_ray.models.generator import Generator
from fsu_ray.recipes import Precision
from fsu_ray.records import ModelSpec
from fsu_ray.work import StepCallback


@dataclass(frozen=True)
class GanRecipe:
    """How the GAN is trained. `width` and `latent` are those of the generator (n, and the dimensions of z); the
    discriminator has `critic_width` channels at half the size, and twice as many at each half of that.

    Both learning rates are held for half of the steps and then fall to 0 with half a cosine.
    """

    steps: int = 2000
    batch: int = 64
    width: int = 8
    latent: int = 100
    lr: float = 1e-3
    critic_lr: float = 4e-4
    critic_width: int = 16
    betas: tuple[float, float] = (0.5, 0.999)
    precision: Precision = "auto"
    seed: int = 0


class Discriminator(nn.Module):
    """D(x, y): pixels (N, C, H, W) in [0, 1] -> a logit for each class (N, K), that of "a real image of this class".

    One convolution of stride 2 for each halving down to 4 pixels at the most; a logit is a linear function of what
    they find, plus its product with the class's own vector.
    """

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        rows, columns, inputs, outputs = spec.height, spec.width, spec.channels, width
        while max(rows, columns) > 4:
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]
            rows, columns, inputs, outputs = max(rows // 2, 1), max(columns // 2, 1), outputs, 2 * outputs
        self.layers = nn.Sequential(*layers)
        self.real = nn.Linear(inputs * rows * columns, 1)
        self.classes = nn.Linear(inputs * rows * columns, spec.classes, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.layers(2 * pixels - 1).flatten(1)
        out: Tensor = self.real(features) + self.classes(features)  # (N, 1) + (N, K)
        return out


def train(
    spec: ModelSpec,
    pixels: Tensor,
    labels: Tensor,
    recipe: GanRecipe,
    device: torch.device,
    on_progress: StepCallback | None = None,
) -> Generator:
    """Train a generator of the classes of `spec` on pixels (N, C, H, W) uint8 with labels (N,), and return it in eval
    mode, on `device`.

    `on_progress` hears of step, steps and both losses every ten steps. The same seed gives the same weights on one kind
    of device with one number of threads. Raises InvalidData where the data do not have the shape of `spec`, or not
    images of every class.
    """
    _check(spec, pixels, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        generator = Generator(spec, recipe.width, recipe.latent)
        discriminator = Discriminator(spec, recipe.critic_width)
    generator = generator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    discriminator = discriminator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = resolve_precision(recipe.precision, device, Group())
    of_generator, of_discriminator = (
        torch.optim.Adam(
            network.parameters(), torch.tensor(lr, device=device), recipe.betas, capturable=device.type == "cuda"
        )
        for network, lr in ((generator, recipe.lr), (discriminator, recipe.critic_lr))
    )

    def update(real: Tensor, y: Tensor, other: Tensor, z: Tensor, share: Tensor) -> Tensor:
        """Descend both losses, at a `share` of the learning rates; they are returned."""
        for optimiser, peak in ((of_generator, recipe.lr), (of_discriminator, recipe.critic_lr)):
            optimiser.param_groups[0]["lr"].copy_(peak * share)
        real = (real.float() / 255).contiguous(memory_format=torch.channels_last)
        with autocast(precision, device):
            drawn = generator(z, y)
            logits = discriminator(torch.cat([real, drawn.detach().to(real.dtype)])).float()
        of_real, of_drawn = logits.chunk(2)
        loss = _bce(_of(of_real, y), 1) + (_bce(_of(of_drawn, y), 0) + _bce(_of(of_real, other), 0)) / 2
        _descend(of_discriminator, loss)
        discriminator.requires_grad_(False)
        with autocast(precision, device):
            fooled = _bce(_of(discriminator(drawn).float(), y), 1)
        _descend(of_generator, fooled)
        discriminator.requires_grad_(True)
        return torch.stack([loss, fooled]).detach()

    replayed = CudaGraphStep(update, [], device)
    generator.train()
    for step in range(recipe.steps):
        rng = seeded(recipe.seed, step)
        chosen = torch.randint(len(pixels), (recipe.batch,), generator=rng)
        y = labels[chosen]
        other = (y + torch.randint(1, spec.classes, (recipe.batch,), generator=rng)) % spec.classes
        z = torch.randn((recipe.batch, recipe.latent), generator=rng)
        loss, fooled = replayed(pixels[chosen], y, other, z, torch.tensor(decay(step / recipe.steps)))
        if on_progress and ((step + 1) % 10 == 0 or step + 1 == recipe.steps):
            on_progress(step + 1, recipe.steps, {"discriminator": loss.item(), "generator": fooled.item()})
    trained: Generator = generator.eval()
    return trained


def _check(spec: ModelSpec, pixels: Tensor, labels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != spec.shape or len(pixels) != len(labels):
        raise InvalidData(
            f"a GAN of this model learns from uint8 images of the shape {spec.shape}, each with a label, "
            f"not from {tuple(pixels.shape)} {pixels.dtype} with {len(labels)} labels"
        )
    if set(labels.tolist()) != set(range(spec.classes)):
        raise InvalidData(f"a GAN of this model needs images of each of its classes, 0 to {spec.classes - 1}")


def _of(logits: Tensor, y: Tensor) -> Tensor:
    """(N, K) -> (N,): the logit of each sample's class."""
    return logits.gather(1, y[:, None])[:, 0]


def _bce(logits: Tensor, truth: int) -> Tensor:
    """Binary cross entropy of logits (N,) against 0 or 1, mean over the batch."""
    return F.softplus(-logits if truth else logits).mean()


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
