"""The metrics on Ray's Prometheus endpoint while a driver runs (Ray prefixes the names with `ray_`):

fsu_requests{model, state}       requests by their state
fsu_queue_depth{model}           requests that could begin now
fsu_generator_uses{model, use}   erasures by the use of their generator: trained, warm_started, reused, transferred
fsu_generator_reuse_ratio        share of erasures that reused a generator, NaN without erasures
fsu_stage_seconds{stage}         histogram: seconds of each stage in the runs of this driver
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fsu_ray.errors import FsuError
from fsu_ray.records import QueueStats

BOUNDARIES = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]
log = logging.getLogger(__name__)


class MetricsExporter:
    """Sets Ray's metrics to what `read_stats` returns, every few `seconds` while the block runs.

    Ray must be connected.
    """

    def __init__(self, read_stats: Callable[[], QueueStats], *, seconds: float = 5.0) -> None:
        from ray.util.metrics import Gauge, Histogram

        self._read_stats, self._seconds = read_stats, seconds
        self._requests: Any = Gauge("fsu_requests", "Requests by their state.", ("model", "state"))
        self._depth: Any = Gauge("fsu_queue_depth", "Requests that could begin now.", ("model",))
        self._uses: Any = Gauge("fsu_generator_uses", "Erasures by the use of their generator.", ("model", "use"))
        self._ratio: Any = Gauge("fsu_generator_reuse_ratio", "Share of erasures whose generator was reused.")
        self._stages: Any = Histogram("fsu_stage_seconds", "Seconds of a stage of a run.", BOUNDARIES, ("stage",))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> MetricsExporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        self._update()

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of each stage of a run that has ended."""
        for stage, value in seconds.items():
            self._stages.observe(value, {"stage": stage})

    def set(self, stats: QueueStats) -> None:
        """Set the gauges."""
        for (model, state), number in stats.requests.items():
            self._requests.set(number, {"model": model, "state": state})
        for model, number in stats.depth.items():
            self._depth.set(number, {"model": model})
        for (model, use), number in stats.uses.items():
            self._uses.set(number, {"model": model, "use": use})
        self._ratio.set(float("nan") if stats.reuse_ratio is None else stats.reuse_ratio)

    def _repeat(self) -> None:
        done = False
        while not done:
            self._update()
            done = self._done.wait(self._seconds)

    def _update(self) -> None:
        try:
            self.set(self._read_stats())
        except FsuError as error:  # the ledger is unavailable for a moment
            log.debug("metrics not updated: %s", error)
