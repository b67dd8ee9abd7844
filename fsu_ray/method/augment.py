"""Differentiable augmentation, one random transformation a sample: the phi_k of eq. 4 and 8.

It works on pixels in [0, 1], before normalisation, so that the zeros that come in at the border are black.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = 15.0  # degrees to either side
SHIFT = 1 / 16  # of the size: 2 pixels of 32


def transform(pixels: Tensor, degrees: Tensor, shift: Tensor, flip: Tensor | None = None) -> Tensor:
    """Rotate, shift and mirror each sample by its own amount; bilinear, zeros come in at the border.

    pixels (N, C, H, W); degrees (N,) anticlockwise; shift (N, 2) as a share of width and height; flip (N,) bool.
    """
    n, _, rows, columns = pixels.shape
    angle = degrees * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    mirror = torch.ones(n, device=pixels.device) if flip is None else 1.0 - 2.0 * flip.float()
    ratio = rows / columns
    theta = torch.stack(
        (
            torch.stack((cos * mirror, -sin * ratio, -2 * shift[:, 0]), 1),
            torch.stack((sin / ratio * mirror, cos, -2 * shift[:, 1]), 1),
        ),
        1,
    )  # (N, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def random_view(pixels: Tensor, rng: torch.Generator, flip: bool = False) -> Tensor:
    """One random view of each sample: up to 15 degrees, up to 1/16 of the size, mirrored half the time if `flip`.

    The draws come from `rng` on the CPU, so they are the same on every device.
    """
    return moved(pixels, draw_moves(len(pixels), rng), flip)


def draw_moves(n: int, rng: torch.Generator) -> Tensor:
    """The draws (n, 4) of n random views, for `moved`."""
    return torch.rand((n, 4), generator=rng)


def moved(pixels: Tensor, draws: Tensor, flip: bool = False) -> Tensor:
    """The view of each sample by its row of draws (N, 4): rotation, two shifts, mirrored or not."""
    draws = draws.to(pixels.device)
    degrees = (2 * draws[:, 0] - 1) * ROTATION
    shift = (2 * draws[:, 1:3] - 1) * SHIFT
    return transform(pixels, degrees, shift, draws[:, 3] < 0.5 if flip else None)


def rotated(pixels: Tensor, degrees: float) -> Tensor:
    """All samples turned by the same angle: a fixed view of eq. 8."""
    n = len(pixels)
    zeros = torch.zeros((n, 2), device=pixels.device)
    return transform(pixels, torch.full((n,), degrees, device=pixels.device), zeros)


def seeded(*parts: int) -> torch.Generator:
    """A CPU generator whose stream depends on all `parts`: a step's draws need no earlier step, so a
    resumed run draws what an undisturbed one would have drawn."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ (part + 0x632BE59BD9B4E019)) * 0xD6E8FEB86659FD93) % 2**64
        state ^= state >> 32
    rng = torch.Generator()
    rng.manual_seed(state % 2**63)
    return rng
