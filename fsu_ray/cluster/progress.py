"""The line between the workers of a run and its driver: progress goes one way, the word to stop the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

ProgressCallback = Callable[[str, int, int, dict[str, float]], None]
"""Hears of progress: the stage, how much of it is done, of how much, and its figures."""


class ProgressActor:
    """An actor between worker and driver: progress goes one way, the word to stop the other."""

    def __init__(self) -> None:
        self._told: list[Any] = []
        self._stopped = False

    def tell(self, item: Any) -> bool:
        """Keep what a worker says for the driver; whether the worker is to stop."""
        self._told.append(item)
        return self._stopped

    def hear(self, stop: bool) -> list[Any]:
        """What workers have said since; from now on they are told to stop where `stop` says so."""
        self._stopped |= stop
        told, self._told = self._told, []
        return told


def new_progress_actor() -> Any:
    """A `Line` on the node of this process, which is not taken away under it: Ray would put it anywhere."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressActor).remote()


class ProgressListener:
    """Hands what workers say to a function of this process, and its word to stop to them, while the block runs."""

    def __init__(self, line: Any, on_progress: ProgressCallback, stop: threading.Event) -> None:
        self._line, self._tell, self._stop = line, on_progress, stop
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
            finished = self._done.wait(0.3)  # one last look after the end
            try:
                for item in ray.get(self._line.hear.remote(self._stop.is_set())):
                    self._tell(*item)
            except RayError:
                return
