"""What `precision` in a recipe is on the device at hand.

bf16 halves the time of an inversion step where the device multiplies it (GPUs since Ampere, CPUs with AVX-512 BF16 or
AMX). Where it does not, PyTorch falls back on its slowest convolutions: a step takes six times as long as in float32 on
a CPU with AVX2 alone. So `auto` is bf16 there and float32 here.
"""

from __future__ import annotations

import torch

from fsu_ray.method.group import Group


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and known is not None and bool(known())


def settled(precision: str, device: torch.device, group: Group) -> str:
    """`precision`, with `auto` as bf16 or float32: bf16 where every rank's device multiplies it."""
    if precision != "auto":
        return precision
    return "bf16" if all(group.everyone(multiplies_bf16(device))) else "float32"


def mixed(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network of that (settled) precision runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
