"""One request, its steps in order. The driver looks at digests and metrics, never at images.

claim ──> plan (one snapshot of the ledger) ──> one Ray Train run ──> gate ──> commit or reject ──> tidy
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from fsu_ray.config import Timings
from fsu_ray.errors import (
    FsuError,
    GeneratorUnfit,
    LeaseLost,
    LedgerUnavailable,
    RunFailed,
    Stopped,
    UserError,
)
from fsu_ray.gate import refuse_result
from fsu_ray.records import ModelVersion, Request, Status
from fsu_ray.retention import tidy
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.planning import Plan
from fsu_ray.work import BlobStore, Outcome, TargetResult, WorkOrder

Execute = Callable[[WorkOrder, BlobStore, str, threading.Event], Outcome]
"""Runs the method: (order, store, name, stop). Raises Stopped soon after `stop` is set."""

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What one attempt at a request came to: its state in the ledger now, its new version and the outcome, if any.

    The results of a batch share one outcome, which has the results of all its targets.
    """

    request: Request
    version: ModelVersion | None
    outcome: Outcome | None

    @property
    def target(self) -> TargetResult | None:
        """The part of the outcome that is about this request, None where there is no outcome."""
        targets = self.outcome.targets if self.outcome else ()
        return next((target for target in targets if target.request == self.request.id), None)

    @property
    def report(self) -> Mapping[str, Any]:
        """The measures of this request's erasure, empty where nothing was measured."""
        return self.target.report if self.target else {}


@dataclass(frozen=True)
class WorkerOptions:
    """Which requests a worker takes: at most `max_requests` (None: all), of one `model` or of all (None).

    `parallel` models run at a time. `coalesce` runs class requests of one model as a batch. Nothing is claimed from
    `until` on.
    """

    max_requests: int | None = None
    model: str | None = None
    parallel: int = 1
    coalesce: bool = False
    until: datetime | None = None


Run = Callable[[Request, threading.Event], list[Result]]
"""Carries out a claimed request; the event is set once the worker is to end."""


def drain(ledger: Ledger, worker: str, options: WorkerOptions, run: Run, timings: Timings = Timings()) -> list[Result]:
    """Claim and run what is ready, until nothing is left or the bounds of `options` are met.

    An interrupt ends all runs at their next step and is raised after that. A run that waits for a node of the cluster
    takes no step: its request is put back after `timings.halt` seconds.
    """
    results: list[Result] = []
    running: dict[str, Request] = {}
    halt = threading.Event()
    claim = _Claims(ledger, worker, options, halt, timings)

    def work() -> None:
        while (request := claim()) is not None:
            running[request.id] = request
            try:
                results.extend(run(request, halt))
            finally:
                del running[request.id]

    if options.parallel == 1:
        work()
        return results
    with ThreadPoolExecutor(options.parallel, thread_name_prefix="fsu") as pool:
        try:
            working = [pool.submit(work) for _ in range(options.parallel)]
            for ended in working:
                ended.result()
        except KeyboardInterrupt:
            halt.set()
            wait(working, timings.halt)
            for request in list(running.values()):
                with suppress(LeaseLost, LedgerUnavailable):  # it has ended after all, or its lease decides
                    ledger.requests.release(request, "interrupted")
            raise
        except BaseException:
            halt.set()
            raise
    return results


class _Claims:
    """Claims requests for the threads of one worker, at most `options.max_requests` in all."""

    def __init__(
        self, ledger: Ledger, worker: str, options: WorkerOptions, halt: threading.Event, timings: Timings
    ) -> None:
        self._ledger, self._worker, self._options, self._timings = ledger, worker, options, timings
        self._halt, self._turn, self._taken = halt, threading.Lock(), 0

    def __call__(self) -> Request | None:
        """The next request, None where there is none, a bound is met or `halt` is set."""
        options, requests = self._options, self._ledger.requests
        with self._turn:  # one thread claims at a time, so that `max_requests` holds
            left = None if options.max_requests is None else options.max_requests - self._taken
            late = options.until is not None and datetime.now(UTC) >= options.until
            if self._halt.is_set() or late or (left is not None and left <= 0):
                return None
            max_batch = (left or 1000) - 1 if options.coalesce else 0
            request = self._retry(
                lambda: requests.claim(
                    self._worker, self._timings.lease, options.model, cap=options.parallel, max_batch=max_batch
                )
            )
            if request is not None:
                members = self._retry(lambda: requests.batch_members(request)) if max_batch else []
                self._taken += 1 + len(members)
            return request

    def _retry(self, act: Callable[[], T]) -> T:
        return retry_while_unavailable(act, self._timings.ledger_wait)


def run_request(
    ledger: Ledger,
    store: Artifacts,
    execute: Execute,
    request: Request,
    halt: threading.Event | None = None,
    timings: Timings = Timings(),
) -> list[Result]:
    """Carry out a claimed request and the requests of its batch to the end of this attempt; its own result is first.

    An error of `execute` is not raised again. The request is queued to be tried again; it fails where the input is to
    blame or after too many failures, and is cancelled where somebody asked for that. A lost lease is raised, since
    another worker has the request then. An interrupt, or `halt` once it is set, puts the request back into the queue;
    the next attempt goes on from the last checkpoint. While the ledger is unavailable the run goes on, and its end
    waits for the ledger.
    """
    stop = threading.Event()

    def stop_wanted() -> bool:
        return (halt is not None and halt.is_set()) or ledger.requests.cancel_requested(request)

    def end(act: Callable[[], Request]) -> list[Result]:
        return [Result(retry_while_unavailable(act, timings.ledger_wait), None, None)]

    try:
        plan = retry_while_unavailable(lambda: ledger.plan(request), timings.ledger_wait)
        with Heartbeat(lambda: ledger.requests.heartbeat(request, timings.lease), stop_wanted, stop, timings):
            outcome = execute(plan.order, store, run_name(plan.order), stop)
        results = settle(ledger, request, plan, outcome, timings)
    except LeaseLost:
        raise
    except Stopped:
        results = end(lambda: ledger.requests.stop(request))
    except KeyboardInterrupt:
        retry_while_unavailable(lambda: ledger.requests.release(request, "interrupted"), seconds=5)
        raise
    except GeneratorUnfit as error:
        refusal = f"generator_unfit: {error}"
        results = end(lambda: ledger.reject(request, refusal, None, None))
    except UserError as error:
        reason = f"{type(error).__name__}: {error}"
        results = end(lambda: ledger.requests.fail(request, reason))
    except Exception as error:  # a bug is the request's end, not the end of the queue
        failure = error if isinstance(error, FsuError) else RunFailed(f"{type(error).__name__}: {error}")
        reason = str(failure)
        results = end(lambda: ledger.requests.retry(request, reason))
    if any(result.request.status.is_terminal for result in results):
        retry_while_unavailable(lambda: tidy(ledger, store, request.model), timings.ledger_wait)
    return results


def run_name(order: WorkOrder) -> str:
    """The name under which a run keeps its checkpoints. Another attempt finds them only with the very same order."""
    return f"{order.targets[0].request}-{hashlib.sha256(repr(order).encode()).hexdigest()[:8]}"


def settle(
    ledger: Ledger, request: Request, plan: Plan, outcome: Outcome, timings: Timings = Timings()
) -> list[Result]:
    """Judge the outcome and record the verdict in one transaction.

    A batch is committed as a whole. If the gate refuses any of its targets, each of its requests is queued again, to
    run alone.
    """
    reason = outcome.reason
    if reason is None:
        refusals = (refuse_result(target.report, request.recipe.gate) for target in outcome.targets)
        reason = next((refusal for refusal in refusals if refusal is not None), None)
    if reason is not None and len(plan.order.targets) > 1:
        apart = f"coalesced run refused: {reason}"
        separated = retry_while_unavailable(lambda: ledger.requests.separate(request, apart), timings.ledger_wait)
        return [Result(separated, None, None)]
    links = _generator_links(plan, outcome)
    if reason is not None:
        rejected = retry_while_unavailable(
            lambda: ledger.reject(request, reason, outcome, plan.lineage.base, **links), timings.ledger_wait
        )
        return [Result(rejected, None, outcome)]
    version = _commit(ledger, request, outcome, plan.lineage.base, links, timings)
    ended = retry_while_unavailable(
        lambda: [ledger.requests.get(target.request) for target in outcome.targets], timings.ledger_wait
    )
    return [Result(member, version, outcome) for member in ended]


def _generator_links(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The arguments of `Ledger.commit` that say which generator the run used, and which version labelled D'."""
    candidates, use = plan.order.generators, outcome.generator_use
    reuse, warm, transfer = candidates.reuse, candidates.warm_start, candidates.transfer
    return {
        "generator_id": reuse.id if use == "reused" and reuse else None,
        "warm_started_from": warm.id if use == "warm_started" and warm else None,
        "transferred_from": transfer.id if use == "transferred" and transfer else None,
        "root": plan.lineage.root.number,
    }


def _commit(
    ledger: Ledger, request: Request, outcome: Outcome, base: ModelVersion, links: dict[str, Any], timings: Timings
) -> ModelVersion:
    """Commit exactly once: where the ledger became unavailable during the commit, look up whether it was made."""
    try:
        return retry_while_unavailable(lambda: ledger.commit(request, outcome, base, **links), timings.ledger_wait)
    except LeaseLost:
        now = retry_while_unavailable(lambda: ledger.requests.get(request.id), timings.ledger_wait)
        if now.status is Status.SUCCEEDED and now.attempt == request.attempt and now.version == base.number + 1:
            version = retry_while_unavailable(
                lambda: ledger.models.version(request.model, base.number + 1), timings.ledger_wait
            )
            if version.weights == outcome.weights:
                return version
        raise


def retry_while_unavailable(act: Callable[[], T], seconds: float = Timings.ledger_wait) -> T:
    """The result of `act`, which is tried again for `seconds` while the ledger's database is unavailable."""
    deadline, pause = time.monotonic() + seconds, 0.25
    while True:
        try:
            return act()
        except LedgerUnavailable:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


class Heartbeat:
    """Renews a lease while the block runs. Sets `stop` when the lease is lost or `stop_wanted()` is true.

    It asks `stop_wanted` every `timings.poll` seconds, and calls `renew` after each third of `timings.lease`. Raises
    LeaseLost at the end of the block if the lease was lost.
    """

    def __init__(
        self,
        renew: Callable[[], object],
        stop_wanted: Callable[[], bool] | None = None,
        stop: threading.Event | None = None,
        timings: Timings = Timings(),
    ) -> None:
        self._renew, self._stop_wanted, self._stop = renew, stop_wanted, stop or threading.Event()
        self._timings = timings
        self._done = threading.Event()
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._lost is not None and (kind is None or issubclass(kind, Stopped)):
            raise self._lost

    def _beat(self) -> None:
        due = time.monotonic() + self._timings.lease / 3
        while not self._done.wait(self._timings.poll):
            try:
                if self._stop_wanted is not None and self._stop_wanted():
                    self._stop.set()
                if time.monotonic() >= due:
                    self._renew()
                    due = time.monotonic() + self._timings.lease / 3
            except LeaseLost as error:
                self._lost = error
                self._stop.set()
                return
            except FsuError:  # the ledger is busy or unavailable: the lease holds for two more tries
                continue
