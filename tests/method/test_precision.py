"""What `precision` comes to: bf16 where every rank's device multiplies it, float32 where one does not."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fsu_ray.method import precision
from fsu_ray.method.group import Group
from fsu_ray.method.precision import autocast, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("able", [True, False])
def test_auto_goes_by_the_device(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    """What is asked for by name stands, whatever the device."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    assert resolve_precision("auto", CPU, Group()) == ("bf16" if able else "float32")
    assert [resolve_precision(name, CPU, Group()) for name in ("bf16", "float32")] == ["bf16", "float32"]
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert resolve_precision("auto", CPU, Group()) == "float32"


def test_a_gpu_is_asked_for_instructions_not_for_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: asked.append(given) or True)
    assert precision.multiplies_bf16(torch.device("cuda"))
    assert asked == [{"including_emulation": False}]


def test_one_rank_that_cannot_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the ranks' parts of a batch would not be of one network."""
    monkeypatch.setattr(Group, "everyone", lambda self, mine: [True, False])
    assert resolve_precision("auto", CPU, Group()) == "float32"


def test_mixed_runs_in_bf16_only_where_it_says_so() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.zeros(1, 4)
    kinds = []
    for name in ("bf16", "float32"):
        with autocast(name, CPU):
            kinds.append(layer(x).dtype)
    assert kinds == [torch.bfloat16, torch.float32]


def test_what_can_repeat_itself_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU: cuBLAS wants a word in the environment. New tensors are not filled for it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        precision.repeatable()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
