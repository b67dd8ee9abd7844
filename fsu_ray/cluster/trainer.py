"""The trainer of a run: Ray Train's, with torch's process group only where a run has several workers.

`TorchTrainer` makes a process group for a single worker too, and its controller loads torch for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from fsu_ray.cluster import internals


@dataclass
class ProcessGroup(BackendConfig):  # type: ignore[misc]
    """torch's process group over `backend`, as `ray.train.torch` makes it, if a run has more than one worker.

    The controller loads torch only then.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return _GroupBackend

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class _GroupBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        if len(worker_group) > 1:
            backend, config = _torch_backend(backend_config)
            backend.on_start(worker_group, config)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        if len(worker_group) > 1:
            backend, config = _torch_backend(backend_config)
            backend.on_shutdown(worker_group, config)


def _torch_backend(config: ProcessGroup) -> tuple[Any, Any]:
    """Ray's backend for torch, and its configuration."""
    from ray.train.torch import TorchConfig

    torch_config = TorchConfig(backend=config.backend)
    return torch_config.backend_cls(), torch_config


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Runs a function in a group of workers. An actor that the controller waits for starts beside the controller."""

    def fit(self) -> Any:
        internals.start_autoscaling_coordinator()
        return super().fit()
