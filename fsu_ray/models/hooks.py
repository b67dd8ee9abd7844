"""Hooks that watch any network: the statistics of its BatchNorm layers (eq. 6) and its features f_e."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fsu_ray.errors import UnsupportedModel
from fsu_ray.models.architectures import batch_norms
from fsu_ray.models.classifier import Classifier


@dataclass
class Observation:
    """What the hooks recorded in one forward pass.

    `statistics`: for every BatchNorm call the batch mean, biased variance, and the layer's running
    mean and variance, each (channels,). `features`: f_e of every sample, (N, F).
    """

    statistics: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    features: Tensor | None = None


@contextmanager
def observe(network: nn.Module, statistics: bool = True) -> Iterator[Observation]:
    """Watch `network` inside the block. The hooks are removed at its end, also after an error.

    f_e is the input of the layer that the network's `feature_layer` names, else of the Linear layer that ran last.
    """
    seen = Observation()

    def on_batch_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()  # (N, C, ...)
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x, dim=axes, correction=0)
        seen.statistics.append((mean, variance, module.running_mean, module.running_var))  # type: ignore[arg-type]

    def on_linear(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.features = inputs[0].flatten(1)

    inner = network.network if isinstance(network, Classifier) else network
    named = getattr(inner, "feature_layer", None)
    layers = [inner.get_submodule(named)] if named else [m for m in inner.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise UnsupportedModel("the network has no Linear layer whose input could serve as features")
    handles = [layer.register_forward_pre_hook(on_linear) for layer in layers]
    if statistics:
        handles += [layer.register_forward_pre_hook(on_batch_norm) for layer in batch_norms(inner)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Affine(torch.autograd.Function):
    """shift + scale * x by channel, and the mean and biased variance, (C,) float32 each, of the first samples of x.

    One pass forward for the statistics, where torch.var_mean takes several times as long if channels come last, and
    one gradient for all three. scale and shift (C,) get none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        part, shape = x[:first], _by_channel(x)
        mean, variance = torch.batch_norm_update_stats(part if x.is_cuda else part.float(), None, None, 0.0)
        ctx.save_for_backward(x, mean, scale)
        ctx.first = first
        return torch.addcmul(shift.view(shape).to(x.dtype), x, scale.view(shape).to(x.dtype)), mean, variance

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, scale = ctx.saved_tensors
        part, shape = x[: ctx.first], _by_channel(x)
        number = part.numel() // part.shape[1]
        slope = 2 / number * of_variance
        level = of_mean / number - slope * mean
        gradient = of_y * scale.view(shape).to(of_y.dtype)
        gradient[: ctx.first] += torch.addcmul(level.view(shape), part.float(), slope.view(shape))
        return gradient, None, None, None


def _by_channel(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *[1] * (x.dim() - 2))


@contextmanager
def affine_batch_norms(network: nn.Module, seen: Observation, first: int) -> Iterator[None]:
    """Inside the block every BatchNorm layer in eval mode is computed as one scale and shift a channel.

    It is the same function, without a BatchNorm's backward pass and without a gradient for the layer's own weights.
    Other hooks run as usual. `seen.statistics` gets the statistics of the `first` samples of the batch alone (the plain
    samples, where augmented views follow). `observe` would compute the same, at the cost of the rest of a step on a
    ResNet-50.
    """
    layers = [layer for layer in batch_norms(network) if not layer.training]
    for layer in layers:
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None is not variance
        with torch.no_grad():
            scale = torch.rsqrt(variance + layer.eps) * (1 if layer.weight is None else layer.weight)
            shift = (0 if layer.bias is None else layer.bias) - mean * scale
        running = (mean, variance)

        def forward(
            x: Tensor, scale: Tensor = scale, shift: Tensor = shift, running: tuple[Tensor, Tensor] = running
        ) -> Tensor:
            y, *moments = _Affine.apply(x, scale, shift, first)
            seen.statistics.append((*moments, *running))
            return y  # type: ignore[no-any-return]

        layer.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
