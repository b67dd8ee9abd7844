"""What `precision` in a recipe is on the device at hand, and how far its results repeat themselves.

bf16 halves the time of an inversion step where the device multiplies it (GPUs since Ampere, CPUs with AVX-512 BF16 or
AMX). Where it does not, PyTorch falls back on its slowest convolutions: a step takes six times as long as in float32 on
a CPU with AVX2 alone. So `auto` is bf16 there and float32 here.
"""

from __future__ import annotations

import os

import torch

from fsu_ray.method.group import Group


def default_device() -> torch.device:
    """Where a process works that was not told where: on a GPU where it sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def repeatable() -> None:
    """Have this process take algorithms that give the same result each time; call it before CUDA is first used.

    On a CPU all do. On a GPU some have no such form, like the gradient of `grid_sample` in the views of eq. 4: they run
    as they are, with a warning, and two inversions there differ by more than rounding in the end.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else each new tensor is filled first, which is to find bugs.
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
    """The context in which a network of that (settled) precision runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
