"""What Prometheus finds on Ray's endpoint while a driver works (Ray puts `ray_` before the names):

fsu_requests{model, state}       requests by their state
fsu_queue_depth{model}           requests that could begin now
fsu_generator_uses{model, use}   erasures by what their generator was: trained, warm_started, reused or transferred
fsu_generator_reuse_ratio        the share of all erasures that reused one, NaN where there are none
fsu_stage_seconds{stage}         histogram of the seconds of the stages of the runs of this driver
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fsu_ray.errors import FsuError
from fsu_ray.records import QueueStats

SECONDS = 5.0
"""Between two looks at the ledger."""

BOUNDARIES = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]
log = logging.getLogger(__name__)


class MetricsExporter:
    """Hands what `look` finds to Ray's metrics, every few seconds while the block runs; Ray must be connected."""

    def __init__(self, look: Callable[[], QueueStats]) -> None:
        from ray.util.metrics import Gauge, Histogram

        self._look = look
        self._requests: Any = Gauge("fsu_requests", "Requests by their state.", ("model", "state"))
        self._depth: Any = Gauge("fsu_queue_depth", "Requests that could begin now.", ("model",))
        self._uses: Any = Gauge("fsu_generator_uses", "Erasures by the use of their generator.", ("model", "use"))
        self._ratio: Any = Gauge("fsu_generator_reuse_ratio", "Share of erasures whose generator was reused.")
        self._stages: Any = Histogram("fsu_stage_seconds", "Seconds of a stage of a run.", BOUNDARIES, ("stage",))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> MetricsExporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        self._see()

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Count the stages of a run that has ended."""
        for stage, value in seconds.items():
            self._stages.observe(value, {"stage": stage})

    def set(self, figures: QueueStats) -> None:
        """Set what the ledger says."""
        for (model, state), number in figures.requests.items():
            self._requests.set(number, {"model": model, "state": state})
        for model, number in figures.depth.items():
            self._depth.set(number, {"model": model})
        for (model, use), number in figures.uses.items():
            self._uses.set(number, {"model": model, "use": use})
        self._ratio.set(float("nan") if figures.reuse_ratio is None else figures.reuse_ratio)

    def _beat(self) -> None:
        over = False
        while not over:
            self._see()
            over = self._done.wait(SECONDS)

    def _see(self) -> None:
        try:
            self.set(self._look())
        except FsuError as error:  # the ledger is away for a moment
            log.debug("no figures: %s", error)
