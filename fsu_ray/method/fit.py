"""The one supervised training loop: a classifier, pixels and (soft) targets.

Training from scratch, relearning (eq. 10) and the baselines all use `fit`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsu_ray.errors import InvalidConfig
from fsu_ray.method.augment import draw_moves, moved, seeded
from fsu_ray.method.cuda_graph import CudaGraphStep
from fsu_ray.method.group import Group
from fsu_ray.method.precision import autocast, resolve_precision
from fsu_ray.work import StepCallback


@dataclass(frozen=True)
class TrainingSchedule:
    """How to train. `lr` is the peak of the learning rate: reached and left in one cycle (`one_cycle`), or held for
    half of the training and lowered to zero after that."""

    epochs: int
    batch: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 2e-4
    one_cycle: bool = True
    frozen_statistics: bool = False
    precision: str = "float32"
    seed: int = 0


def fit(
    classifier: nn.Module,
    pixels: Tensor,
    targets: Tensor,
    schedule: TrainingSchedule,
    flip: bool = False,
    on_epoch: StepCallback | None = None,
    as_they_are: Tensor | None = None,
    group: Group | None = None,
) -> None:
    """Train `classifier` in place with SGD and cross entropy on augmented samples.

    pixels (N, C, H, W) uint8; targets (N,) class numbers or (N, K) probabilities; as_they_are (N,) bool:
    samples that are not augmented. With `frozen_statistics` BatchNorm stays in eval mode, so its running statistics
    keep describing the data they came from. Deterministic on the CPU for a seed and a number of threads.

    `on_epoch` hears of epoch, epochs and the mean loss. The ranks of `group` share every batch; they must be given the
    same data, and BatchNorm must be frozen. Raises InvalidConfig where a batch has fewer samples than there are ranks.
    """
    group = group or Group()
    device = next(classifier.parameters()).device
    precision = resolve_precision(schedule.precision, device, group)
    n = len(pixels)
    batches = max(1, -(-n // schedule.batch))
    total = schedule.epochs * batches
    optimiser = _optimiser(classifier, schedule)
    _avoid_channels_last_on_cpu(classifier, device)
    pixels, targets = pixels.to(device), targets.to(device)
    as_they_are = None if as_they_are is None else as_they_are.to(device)
    classifier.train(not schedule.frozen_statistics)
    assert group.size == 1 or schedule.frozen_statistics
    if n // batches < group.size:
        raise InvalidConfig(f"a batch of {schedule.batch} is too small for {group.size} workers; take a larger one")
    model = group.parallel(classifier)

    def descend(index: Tensor, moves: Tensor, weight: Tensor) -> Tensor:
        plain = pixels[index].float() / 255
        view = moved(plain, moves, flip)
        if as_they_are is not None:
            view = torch.where(as_they_are[index].view(-1, 1, 1, 1), plain, view)
        with autocast(precision, device):
            logits = model(view)
        loss = F.cross_entropy(logits.float(), targets[index]) * weight
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    gradients = CudaGraphStep(descend, classifier.parameters(), device, plain=group.size > 1)
    step = 0
    for epoch in range(schedule.epochs):
        rng = seeded(schedule.seed, epoch)
        order = torch.randperm(n, generator=rng)
        loss_sum = torch.zeros((), device=device)
        for batch in torch.tensor_split(order, batches):  # even parts: BatchNorm cannot train on a batch of one
            moves = draw_moves(len(batch), rng)[group.share(len(batch))]
            index = batch[group.share(len(batch))]
            optimiser.param_groups[0]["lr"] = schedule.lr * _shape(step / total, schedule.one_cycle)
            loss_sum += gradients(index, moves, torch.tensor(group.weight(len(index), len(batch))))
            optimiser.step()
            step += 1
        if on_epoch:
            on_epoch(epoch + 1, schedule.epochs, {"loss": float(group.total(loss_sum)) / group.size / batches})
    classifier.eval()


def _avoid_channels_last_on_cpu(classifier: nn.Module, device: torch.device) -> None:
    """Work around oneDNN's issue 6035: with a channels_last input, the weight gradient of a strided 1x1 convolution of
    few channels writes out of bounds, as in PreActResNet-18 of width 8."""
    if device.type == "cpu":
        classifier.to(memory_format=torch.contiguous_format)


def _optimiser(classifier: nn.Module, schedule: TrainingSchedule) -> torch.optim.SGD:
    return torch.optim.SGD(
        classifier.parameters(),
        lr=schedule.lr,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        nesterov=schedule.momentum > 0,
        fused=next(classifier.parameters()).is_cuda or None,
    )


def _shape(done: float, one_cycle: bool) -> float:
    """The learning rate after the share `done` of the run, as a share of its peak."""
    if one_cycle:
        return 0.1 + 4.5 * done if done < 0.2 else (1 - done) / 0.8
    return 1.0 if done < 0.5 else 2 * (1 - done)


@torch.no_grad()
def predict(classifier: nn.Module, pixels: Tensor, batch: int = 1000) -> Tensor:
    """Logits (N, K) in float32 of uint8 pixels (N, C, H, W); eval mode."""
    device = next(classifier.parameters()).device
    classifier.eval()
    return torch.cat([classifier(part.to(device).float() / 255).float().cpu() for part in torch.split(pixels, batch)])
