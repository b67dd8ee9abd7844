"""The conditional generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsu_ray.models.classifier import save_weights
from fsu_ray.records import ModelSpec


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
        """The weights as safetensors, which `generators.read_generator` reads."""
        return save_weights(self)
