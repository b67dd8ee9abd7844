"""The networks: classifiers, the conditional generator, and hooks that watch any of them.

A classifier is built from a `ModelSpec` alone; its weights come from safetensors. `Classifier` takes
pixels in [0, 1] and normalises them itself, so augmentation always sees un-normalised pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fsu_ray.errors import InvalidWeights, UnsupportedModel
from fsu_ray.models.architectures import batch_norms, build_network
from fsu_ray.records import ModelSpec


class Classifier(nn.Module):
    """A network behind its normalisation: pixels in [0, 1], (N, C, H, W) -> logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.network = build_network(spec)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.network((pixels - self.mean) / self.std)
        return out

    def to_bytes(self) -> bytes:
        """The network's weights as safetensors; the same weights give the same bytes."""
        return _as_bytes(self.network)

    @classmethod
    def from_bytes(cls, spec: ModelSpec, data: bytes) -> Classifier:
        """The classifier of `spec` with the weights in `data` (safetensors), in eval mode.

        Raises InvalidWeights where the file is no safetensors, is cut short, or does not fit.
        """
        classifier = cls(spec)
        load_weights(classifier.network, data, spec.arch)
        return classifier.eval()


def _as_bytes(network: nn.Module) -> bytes:
    return save_tensors({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()})


def load_weights(network: nn.Module, data: bytes, name: str, check: str = "--arch, --input and --classes") -> None:
    """Load safetensors `data` into `network`; nothing is ever unpickled. Raises InvalidWeights."""
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        if data[:2] == b"PK" or data[:1] == b"\x80":
            raise InvalidWeights(
                "the weights are a pickle (torch.save), which could run code when read: save them with "
                "safetensors.torch.save_file(model.state_dict(), 'w.safetensors')"
            ) from None
        raise InvalidWeights(f"the weights are not a whole safetensors file ({error}); copy or save it again") from None
    expected = network.state_dict()
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        what = f"lack {missing[0]!r}" if missing else f"hold {surplus[0]!r} too"
        raise InvalidWeights(
            f"the weights do not fit {name}: they {what} ({len(missing)} missing, {len(surplus)} unknown tensors)"
        )
    for key, tensor in expected.items():
        if tensors[key].shape != tensor.shape:
            raise InvalidWeights(
                f"the weights do not fit {name}: {key!r} is {tuple(tensors[key].shape)}, "
                f"{tuple(tensor.shape)} is needed; check {check}"
            )
        if not tensors[key].dtype.is_floating_point and tensor.dtype.is_floating_point:
            raise InvalidWeights(
                f"the weights hold {tensors[key].dtype} in {key!r}: save them as floating point numbers"
            )
        if not torch.isfinite(tensors[key].to(tensor.dtype)).all():
            raise InvalidWeights(f"the weights hold numbers that are not finite in {key!r}")
    network.load_state_dict(tensors)


class UpsampledConv(nn.Conv2d):
    """A 3x3 convolution of the input enlarged 2 x 2 by nearest neighbour, without enlarging it.

    Every output pixel sees only 2 x 2 distinct inputs, so the 3x3 kernel folds into a transposed
    convolution of stride 2 with a 4x4 kernel: the same function and gradient with 4/9 of the
    multiplications and no enlarged copy.
    """

    fold: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        # The 4-tap kernel is the (flipped) 3-tap kernel convolved with the (1, 1) of the enlargement.
        fold = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # (4, 3)
        self.register_buffer("fold", fold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, I, H, W) -> (N, O, 2H, 2W)
        with torch.autocast(x.device.type, enabled=False):
            kernel = (self.fold @ self.weight @ self.fold.T).transpose(0, 1)  # (I, O, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """The conditional generator G (DCGAN with a class): z (N, latent), y (N,) -> pixels in [0, 1].

    It is conditioned on the classes alone and never sees a target sample, which is what makes it
    reusable. `width` is n: 8n, 4n and 2n channels at 1/4, 1/2 and the full size.
    """

    def __init__(self, spec: ModelSpec, width: int, latent: int) -> None:
        super().__init__()
        self.classes, self.width, self.latent = spec.classes, width, latent
        self.rows, self.columns = spec.height // 4, spec.width // 4
        self.linear = nn.Linear(latent + spec.classes, 8 * width * self.rows * self.columns)
        self.bn0 = nn.BatchNorm2d(8 * width)
        self.conv1 = UpsampledConv(8 * width, 4 * width)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.conv2 = UpsampledConv(4 * width, 2 * width)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, spec.channels, 3, padding=1)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        condition = F.one_hot(y, self.classes).to(z.dtype)
        x = self.linear(torch.cat((z, condition), 1)).view(-1, 8 * self.width, self.rows, self.columns)
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.leaky_relu(self.bn1(self.conv1(self.bn0(x))), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        return torch.sigmoid(self.conv3(x))

    def to_bytes(self) -> bytes:
        """The weights as safetensors, which `reading.read_generator` reads; the same weights give the same bytes."""
        return _as_bytes(self)


@dataclass
class Observation:
    """What the hooks saw in one forward pass.

    `statistics`: for every BatchNorm call the batch mean, biased variance, and the layer's running
    mean and variance, each (channels,). `features`: f_e of every sample, (N, F).
    """

    statistics: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    features: Tensor | None = None


@contextmanager
def observe(network: nn.Module, statistics: bool = True) -> Iterator[Observation]:
    """Watch `network` inside the block; the hooks are gone afterwards, also after an error.

    f_e is the input of the layer named by the network's `feature_layer`, else of the Linear layer that ran last (method
    sheet, "f_e").
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
    """Inside the block every BatchNorm layer in eval mode is what it then amounts to, one scale and shift a channel.

    The same function without a BatchNorm's backward pass, and without a gradient for the layer's own weights. Hooks run
    as ever. Into `seen` go the statistics of the first samples of the batch alone (the plain ones, where augmented
    views follow), otherwise as `observe` takes them, which costs as much as the rest of a step on a ResNet-50.
    """
    layers = [layer for layer in batch_norms(network) if not layer.training]
    for layer in layers:
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None is not variance
        with torch.no_grad():
            scale = torch.rsqrt(variance + layer.eps) * (1 if layer.weight is None else layer.weight)
            shift = (0 if layer.bias is None else layer.bias) - mean * scale
        kept = (mean, variance)

        def forward(
            x: Tensor, scale: Tensor = scale, shift: Tensor = shift, kept: tuple[Tensor, Tensor] = kept
        ) -> Tensor:
            y, *moments = _Affine.apply(x, scale, shift, first)
            seen.statistics.append((*moments, *kept))
            return y  # type: ignore[no-any-return]

        layer.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
