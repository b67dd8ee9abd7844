"""The precision of a recipe on the device at hand, and deterministic algorithms.

bf16 halves the time of an inversion step where the device has instructions for it (GPUs since Ampere, CPUs with AVX-512
BF16 or AMX). Elsewhere PyTorch falls back on its slowest convolutions: a step takes six times as long as in float32 on
a CPU with AVX2 alone. So `auto` is bf16 where there are such instructions, else float32.
"""

from __future__ import annotations

import os

import torch

from fsu_ray.method.group import Group


def default_device() -> torch.device:
    """The GPU if this process sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def repeatable() -> None:
    """Use deterministic algorithms in this process. Call it before CUDA is first used.

    On a CPU all algorithms are deterministic. On a GPU some have no deterministic form, such as the gradient of
    `grid_sample` in the views of eq. 4: they run with a warning, and the results of two inversions differ by more than
    rounding.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
    torch.use_deterministic_algorithms(True, warn_only=True)
    # By default each new tensor would be filled first, an aid to debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and known is not None and bool(known())


def resolve_precision(precision: str, device: torch.device, group: Group) -> str:
    """`precision`, with `auto` as bf16 or float32: bf16 where every rank's device multiplies it."""
    if precision != "auto":
        return precision
    return "bf16" if all(group.everyone(multiplies_bf16(device))) else "float32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network runs in `precision`, as `resolve_precision` gives it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
