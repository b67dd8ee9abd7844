"""The trainer makes a process group only for several workers. Whole runs are in test_workers."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray.train.torch import TorchConfig

from fsu_ray.cluster.trainer import ProcessGroup


class Workers(list[str]):
    """Stands for a worker group, of which only the size is read."""


def test_the_controller_loads_no_torch() -> None:
    """The modules that are pickled to it do not import torch, which takes seconds of each start."""
    code = "import sys, fsu_ray.cluster.trainer, fsu_ray.cluster.workers, fsu_ray.work; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_one_worker_has_no_process_group_and_two_have_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the given backend, at the start and at the end."""
    called: list[tuple[str, int, str]] = []
    torch_backend = TorchConfig().backend_cls
    for name in ("on_start", "on_shutdown"):
        monkeypatch.setattr(
            torch_backend,
            name,
            lambda self, group, config, name=name: called.append((name, len(group), config.backend)),
        )
    config = ProcessGroup("cpu:gloo,cuda:nccl")
    backend = config.backend_cls()
    assert backend.share_cuda_visible_devices is torch_backend.share_cuda_visible_devices
    for group in (Workers("a"), Workers("ab")):
        backend.on_start(group, config)
        backend.on_shutdown(group, config)
    assert called == [("on_start", 2, "cpu:gloo,cuda:nccl"), ("on_shutdown", 2, "cpu:gloo,cuda:nccl")]
