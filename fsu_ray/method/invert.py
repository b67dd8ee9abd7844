"""Inversion: train a generator of data like the training data of a classifier (section 3.1, Algorithm 1).

It needs the classifier and no data. The five losses are those of the paper with these reductions: means over the batch
instead of sums, means inside the exponent of eq. 5 (over pairs, dimensions of z and of f_e), sums over classes, views
and layers. `form` decides about the norms of eq. 4, 6 and 7. `"squared"` is the paper's form. `"norm"` does not square
them, so that one layer or one bad sample does not drown the rest. `"relative"` is `"norm"`, with eq. 6 layer by layer
as a share of the running statistics, so that one weight serves networks of any depth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsu_ray.errors import Stopped
from fsu_ray.method.augment import draw_moves, moved, seeded
from fsu_ray.method.cuda_graph import CudaGraphStep
from fsu_ray.method.group import Group
from fsu_ray.method.precision import autocast, resolve_precision
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator
from fsu_ray.models.hooks import affine_batch_norms, observe
from fsu_ray.recipes import Form, InvertRecipe
from fsu_ray.work import StepCallback

Statistics = list[tuple[Tensor, Tensor, Tensor, Tensor]]


def entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 3: mean cross entropy of G(z, y) against the y it was conditioned on. logits (N, K), labels (N,)."""
    return F.cross_entropy(logits, labels)


def augmentation_loss(probabilities: Tensor, views: Tensor, squared: bool = False) -> Tensor:
    """Eq. 4: how far the classifier's probabilities move under augmentation; sum over views, mean over the batch.

    probabilities (N, K) of the plain samples, views (V, N, K) of their augmentations.
    """
    if not len(views):
        return probabilities.new_zeros(())
    difference = (views - probabilities).square().sum(-1)  # (V, N)
    return (difference if squared else _root(difference)).mean(1).sum()


def diversity_loss(latent: Tensor, features: Tensor, classes: int) -> Tensor:
    """Eq. 5: the sum over classes of exp(-mean over pairs of |z1 - z2|^2 |f1 - f2|_1), between 0 and `classes`.

    latent (classes * m, L) and features (classes * m, F), sorted by class, the same number of each.
    """
    z = latent.view(classes, -1, latent.shape[1])  # (K, m, L)
    f = features.view(classes, -1, features.shape[1])  # (K, m, F)
    m = z.shape[1]
    far_z = torch.cdist(z, z).square() / z.shape[2]
    far_f = torch.cdist(f, f, p=1) / f.shape[2]  # (K, m, m)
    return torch.exp(-(far_z * far_f).sum((1, 2)) / (m * (m - 1))).sum()


def bn_loss(statistics: Statistics, form: Form = "norm") -> Tensor:
    """Eq. 6: distance of the batch's mean and variance from the running ones, summed over BatchNorm layers.

    statistics: four (channels,) tensors a layer, as `hooks.observe` gives them. The sum grows with depth and with the
    size of a layer's statistics. `relative` is the mean over layers of two ratios: the distance of the means over the
    norm of the running deviation, and the distance of the variances over the norm of the running variance.
    """
    total = statistics[0][0].new_zeros(())
    for mean, variance, running_mean, running_variance in statistics:
        distances = [(mean - running_mean).square().sum(), (variance - running_variance).square().sum()]
        if form != "squared":
            distances = [_root(distance) for distance in distances]
        if form == "relative":
            spread = running_variance + 1e-5  # as BatchNorm itself has it: a layer may be dead
            distances = [distances[0] / spread.sum().sqrt(), distances[1] / spread.norm()]
        for distance in distances:
            total = total + distance
    return total / len(statistics) if form == "relative" else total


def tv_loss(pixels: Tensor, squared: bool = False) -> Tensor:
    """Eq. 7: total variation of each image, mean over the batch. pixels (N, C, H, W)."""
    rows = (pixels[:, :, 1:] - pixels[:, :, :-1]).square().sum((1, 2, 3))
    columns = (pixels[..., 1:] - pixels[..., :-1]).square().sum((1, 2, 3))
    return ((rows + columns) if squared else _root(rows + columns)).mean()


def _root(x: Tensor) -> Tensor:
    return (x + 1e-12).sqrt()  # finite gradient at 0


@dataclass
class Inversion:
    """A generator in training: everything that a checkpoint holds of it."""

    generator: Generator
    optimiser: torch.optim.Adam
    step: int = 0

    def state(self) -> dict[str, Any]:
        """A copy as tensors and numbers, which `torch.load(weights_only=True)` reads."""
        state = {"generator": self.generator.state_dict(), "optimiser": self.optimiser.state_dict(), "step": self.step}
        return copy.deepcopy(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.generator.load_state_dict(state["generator"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = int(state["step"])


def begin(classifier: Classifier, recipe: InvertRecipe, warm: dict[str, Tensor] | None = None) -> Inversion:
    """A new generator for `classifier` on its device, with the weights of `warm` where names and shapes agree."""
    device = next(classifier.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        generator = Generator(classifier.spec, recipe.width, recipe.latent)
    if warm:
        state = generator.state_dict()
        state.update({k: v for k, v in warm.items() if k in state and state[k].shape == v.shape})
        generator.load_state_dict(state)
    generator = generator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(
        generator.parameters(),
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda" or None,
    )
    return Inversion(generator, optimiser)


def draws(classes: int, recipe: InvertRecipe, step: int) -> tuple[Tensor, Tensor]:
    """The random draws of `step`, on the CPU: z (N, L), the same number of samples of every class, and the moves of
    their views (V, N, 4)."""
    n = recipe.each(classes) * classes
    rng = seeded(recipe.seed, step)
    z = torch.randn((n, recipe.latent), generator=rng)
    return z, torch.stack([draw_moves(n, rng) for _ in range(recipe.views)]) if recipe.views else torch.zeros(0, n, 4)


def losses(
    classifier: Classifier, generator: nn.Module, recipe: InvertRecipe, step: int, group: Group | None = None
) -> dict[str, Tensor]:
    """`losses_of` the `draws` for `step`."""
    return losses_of(classifier, generator, recipe, *draws(classifier.spec.classes, recipe, step), group)


def losses_of(
    classifier: Classifier,
    generator: nn.Module,
    recipe: InvertRecipe,
    z: Tensor,
    moves: Tensor,
    group: Group | None = None,
) -> dict[str, Tensor]:
    """The five losses of one batch, unweighted, by its `draws`.

    The plain samples and all their views go through the classifier in one pass. The BatchNorm statistics are those of
    the plain samples alone.

    A rank of `group` generates its share of the batch. Eq. 5 and 6 are computed over the whole batch on every rank. The
    other losses are computed over the share, weighted such that their mean over ranks is that of the batch.
    """
    group = group or Group()
    device = next(generator.parameters()).device
    k, n = classifier.spec.classes, len(z)
    z, moves = z.to(device), moves.to(device)
    y = torch.arange(k, device=device)[:, None].expand(k, n // k).flatten()
    squared = recipe.form == "squared"
    part = group.share(n)
    with autocast(resolve_precision(recipe.precision, device, group), device):
        pixels = generator(z[part], y[part]).float()
        own = len(pixels)
        views = [moved(pixels, each[part], classifier.spec.flip) for each in moves]
        with observe(classifier, statistics=False) as seen, affine_batch_norms(classifier, seen, own):
            logits = classifier(torch.cat([pixels, *views])).float()
    assert seen.features is not None
    probabilities = logits.softmax(1).view(1 + len(moves), own, k)
    _, moments = group.pool([(mean, variance, running) for mean, variance, running, _ in seen.statistics], own)
    statistics = [(*pooled, *local[2:]) for pooled, local in zip(moments, seen.statistics, strict=True)]
    weight = group.weight(own, n)
    return {
        "bn": bn_loss(statistics, recipe.form),
        "entropy": entropy_loss(logits[:own], y[part]) * weight,
        "augmentation": augmentation_loss(probabilities[0], probabilities[1:], squared) * weight,
        "diversity": diversity_loss(z, group.gather(seen.features[:own].float(), n), k),
        "tv": tv_loss(pixels, squared) * weight,
    }


def invert(
    classifier: Classifier,
    recipe: InvertRecipe,
    run: Inversion,
    on_step: StepCallback | None = None,
    checkpoint: Callable[[Inversion], None] | None = None,
    every: int = 100,
    group: Group | None = None,
    until: int | None = None,
) -> Generator:
    """Train `run` to `recipe.steps`, or to step `until` of these, and return its generator in eval mode.

    `on_step` hears of step, steps and the losses every ten steps. `checkpoint` gets `run` every `every` steps, and
    once more where `on_step` raises Stopped. A step's draws depend on the seed and its number alone, so a
    resumed run ends with the weights of an undisturbed one. The ranks of `group` share each step's batch and end with
    the same weights.
    """
    group = group or Group()
    device = next(run.generator.parameters()).device
    precision = resolve_precision(recipe.precision, device, group)
    recipe = recipe.model_copy(update={"precision": precision})  # once, not at every step
    group.synchronise(run.generator)
    model = group.parallel(run.generator)
    weights = recipe.weights.model_dump()
    classifier.eval().requires_grad_(False)
    run.generator.train()

    def descend(z: Tensor, moves: Tensor) -> Tensor:
        batch_losses = losses_of(classifier, model, recipe, z, moves, group)
        total = torch.stack([weights[name] * value for name, value in batch_losses.items()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return torch.stack([batch_losses[name].detach() for name in weights])

    gradients = CudaGraphStep(descend, run.generator.parameters(), device, plain=group.size > 1)
    while run.step < (until or recipe.steps):
        for parameters in run.optimiser.param_groups:
            parameters["lr"] = recipe.lr * decay(run.step / recipe.steps)
        step_losses = gradients(*draws(classifier.spec.classes, recipe, run.step))
        run.optimiser.step()
        run.step += 1
        if on_step and (run.step % 10 == 0 or run.step == recipe.steps):
            means = group.total(step_losses) / group.size
            try:
                on_step(run.step, recipe.steps, dict(zip(weights, means.tolist(), strict=True)))
            except Stopped:
                if checkpoint and run.step < recipe.steps:
                    checkpoint(run)
                raise
        if checkpoint and run.step % every == 0 and run.step < recipe.steps:
            checkpoint(run)
    classifier.requires_grad_(True)
    return run.generator.eval()


def decay(done: float) -> float:
    """The learning rate after the share `done` of the run, as a share of its peak: held, then half a cosine down."""
    return 1.0 if done < 0.5 else 0.5 + 0.5 * math.cos(math.pi * (2 * done - 1))
