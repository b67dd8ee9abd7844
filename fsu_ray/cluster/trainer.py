"""Ray Train's trainer without what no run of ours uses: on two cores that was a third of the time to start a group.

Left out are an actor for Ray Data (there are no data sets), torch in the controller, and, for a single worker, the
process group. An actor that the controller waits for is asked for while the controller itself is being loaded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


@dataclass
class Processes(BackendConfig):  # type: ignore[misc]
    """torch's process group over `backend`, as `ray.train.torch` makes it, where there is more than one worker.

    The controller loads torch for it then, and only then.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return _Processes

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class _Processes(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Processes) -> None:
        if len(worker_group) > 1:
            torchs, config = _torchs(backend_config)
            torchs.on_start(worker_group, config)

    def on_shutdown(self, worker_group: Any, backend_config: Processes) -> None:
        if len(worker_group) > 1:
            torchs, config = _torchs(backend_config)
            torchs.on_shutdown(worker_group, config)


def _torchs(config: Processes) -> tuple[Any, Any]:
    """Ray's own, and its configuration."""
    from ray.train.torch import TorchConfig

    made = TorchConfig(backend=config.backend)
    return made.backend_cls(), made


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Runs a function in a group of workers; takes what `TorchTrainer` does, but for data sets."""

    def fit(self) -> Any:
        with contextlib.suppress(ImportError):  # the controller asks for it in any case, and waits
            from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

            coordinator.get_or_create_autoscaling_coordinator()
        return super().fit()

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]
