"""The channel between the workers of a run and its driver: progress goes to the driver, the order to stop goes back."""

from __future__ import annotations

import threading
from typing import Any

from fsu_ray.records import ProgressCallback

Report = tuple[str, int, int, dict[str, float]]
"""The arguments of one call of a ProgressCallback."""


class ProgressActor:
    """A Ray actor that keeps the reports of workers until the driver fetches them, and tells workers to stop."""

    def __init__(self) -> None:
        self._reports: list[Report] = []
        self._stopped = False

    def tell(self, report: Report) -> bool:
        """Called by a worker: keep `report` for the driver. Whether the worker must stop."""
        self._reports.append(report)
        return self._stopped

    def hear(self, stop: bool) -> list[Report]:
        """Called by the driver: the reports since the last call. With `stop`, workers must stop from now on."""
        self._stopped |= stop
        reports, self._reports = self._reports, []
        return reports


def new_progress_actor() -> Any:
    """A ProgressActor on the node of this process. Ray might place it on a node that is later removed."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressActor).remote()


class ProgressListener:
    """Passes the reports of workers to a function of this process, and its `stop` event to them, while the block runs.

    `seconds`: how often the actor is asked.
    """

    def __init__(
        self, actor: Any, on_progress: ProgressCallback, stop: threading.Event, *, seconds: float = 0.3
    ) -> None:
        self._actor, self._on_progress, self._stop, self._seconds = actor, on_progress, stop, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> ProgressListener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)

    def _listen(self) -> None:
        import ray
        from ray.exceptions import RayError

        finished = False
        while not finished:
            finished = self._done.wait(self._seconds)  # asks once more after the end of the block
            try:
                for report in ray.get(self._actor.hear.remote(self._stop.is_set())):
                    self._on_progress(*report)
            except RayError:
                return
