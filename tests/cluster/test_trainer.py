"""The trainer starts nothing that no run needs. (What it does need, the runs of test_workers show.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from fsu_ray.cluster.trainer import Processes, Trainer


class Workers(list[str]):
    """A worker group, of which only the size is looked at."""


def test_the_controller_loads_no_torch() -> None:
    """What is pickled to it comes from these modules: torch would be four seconds of each run's start."""
    code = "import sys, fsu_ray.cluster.trainer, fsu_ray.cluster.workers, fsu_ray.work; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_one_worker_needs_no_process_group_and_two_get_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend that was asked for, at the start and at the end."""
    called: list[tuple[str, int, str]] = []
    torchs = TorchConfig().backend_cls
    for name in ("on_start", "on_shutdown"):
        monkeypatch.setattr(
            torchs, name, lambda self, group, config, name=name: called.append((name, len(group), config.backend))
        )
    config = Processes("cpu:gloo,cuda:nccl")
    made = config.backend_cls()
    assert made.share_cuda_visible_devices is torchs.share_cuda_visible_devices
    for group in (Workers("a"), Workers("ab")):
        made.on_start(group, config)
        made.on_shutdown(group, config)
    assert called == [("on_start", 2, "cpu:gloo,cuda:nccl"), ("on_shutdown", 2, "cpu:gloo,cuda:nccl")]


def test_no_actor_for_data_sets(tmp_path: Path) -> None:
    """All other callbacks of Ray's are there."""
    trainer = Trainer(
        lambda: None,
        backend_config=Processes("gloo"),
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="r", storage_path=str(tmp_path)),
    )
    left = {type(each).__name__ for each in trainer._create_default_callbacks()}
    whole = {type(each).__name__ for each in super(Trainer, trainer)._create_default_callbacks()}
    assert whole - left == {"DatasetsCallback"}
