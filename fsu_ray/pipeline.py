"""One request, its steps in order. The driver looks at digests and figures, never at images.

claim ──> offer (registry) ──> work order ──> one Ray Train run ──> judge ──> commit or reject ──> tidy
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from fsu_ray.config import LEASE_SECONDS, POLL_SECONDS, WAIT_SECONDS
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
from fsu_ray.recipes import Recipe
from fsu_ray.records import ModelVersion, Request, Status
from fsu_ray.retention import tidy
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.registry import GeneratorCandidates, earlier_erasures, offer, offer_named
from fsu_ray.work import BlobStore, ErasureTarget, Outcome, WorkOrder

Execute = Callable[[WorkOrder, BlobStore, str, threading.Event], Outcome]
"""Runs the method: (order, store, name, stop). Raises Stopped soon after `stop` is set."""

HALT_SECONDS = 40.0
"""How long runs side by side have for their next step once one is interrupted; Ray kills a stopped job after 60 s."""

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What one attempt at a request came to: its state in the ledger now, its new version and the outcome, if any."""

    request: Request
    version: ModelVersion | None
    outcome: Outcome | None


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker takes out of the queue: how many requests at `most` (None: all), of one `model` or all, `parallel`
    models at a time, class requests of a model together where `coalesce` says so, nothing new after `until`."""

    max_requests: int | None = None
    model: str | None = None
    parallel: int = 1
    coalesce: bool = False
    until: datetime | None = None


Run = Callable[[Request, threading.Event], list[Result]]
"""Carries out a claimed request; the event is set once the worker is to end."""


def drain(ledger: Ledger, worker: str, wanted: WorkerOptions, run: Run) -> list[Result]:
    """Claim and run what is ready, until nothing is or the bounds of `wanted` are met.

    An interrupt ends all runs at their next step and is raised then. What waits for a node of the cluster has none:
    its request is put back all the same, before somebody loses patience with this process.
    """
    results: list[Result] = []
    running: dict[str, Request] = {}
    taken, turn, halt = 0, threading.Lock(), threading.Event()

    def claim() -> Request | None:
        nonlocal taken
        with turn:  # one thread claims at a time, so that `most` holds
            left = None if wanted.max_requests is None else wanted.max_requests - taken
            late = wanted.until is not None and datetime.now(UTC) >= wanted.until
            if halt.is_set() or late or (left is not None and left <= 0):
                return None
            max_batch = (left or 1000) - 1 if wanted.coalesce else 0
            request = retry_while_unavailable(
                lambda: ledger.requests.claim(
                    worker, LEASE_SECONDS, wanted.model, cap=wanted.parallel, max_batch=max_batch
                )
            )
            if request is not None:
                taken += 1 + (
                    len(retry_while_unavailable(lambda: ledger.requests.batch_members(request))) if max_batch else 0
                )
            return request

    def work() -> None:
        while (request := claim()) is not None:
            running[request.id] = request
            try:
                results.extend(run(request, halt))
            finally:
                del running[request.id]

    if wanted.parallel == 1:
        work()
        return results
    with ThreadPoolExecutor(wanted.parallel, thread_name_prefix="fsu") as pool:
        try:
            working = [pool.submit(work) for _ in range(wanted.parallel)]
            for ended in working:
                ended.result()
        except KeyboardInterrupt:
            halt.set()
            wait(working, HALT_SECONDS)
            for request in list(running.values()):
                with suppress(LeaseLost, LedgerUnavailable):  # it has ended after all, or its lease decides
                    ledger.requests.release(request, "interrupted")
            raise
        except BaseException:
            halt.set()
            raise
    return results


@dataclass(frozen=True)
class Plan:
    """A claimed request on top of version `base`: the version that labels D', what the registry offers, the order."""

    base: ModelVersion
    root: ModelVersion
    offered: GeneratorCandidates
    order: WorkOrder


def run_request(
    ledger: Ledger, store: Artifacts, execute: Execute, request: Request, halt: threading.Event | None = None
) -> list[Result]:
    """Carry out a claimed request, and those that run along with it, to the end of this attempt; its result first.

    What is raised by `execute` is not raised again: the request is queued to be tried again, fails where the input
    is to blame or it has failed too often, or is cancelled where somebody asked for that. A lost lease is raised,
    since somebody else has the request then. An interrupt, or `halt` once it is set, puts the request back into the
    queue; the next attempt goes on from the last checkpoint. While the ledger is away the run goes on, and its end
    waits for the ledger.
    """
    stop = threading.Event()

    def asked() -> bool:
        return (halt is not None and halt.is_set()) or ledger.requests.cancel_requested(request)

    try:
        plan = retry_while_unavailable(lambda: prepare(ledger, request))
        with Heartbeat(lambda: ledger.requests.heartbeat(request, LEASE_SECONDS), asked, stop):
            outcome = execute(plan.order, store, run_name(plan.order), stop)
        results = settle(ledger, request, plan, outcome)
    except LeaseLost:
        raise
    except Stopped:
        results = [Result(retry_while_unavailable(lambda: ledger.requests.stop(request)), None, None)]
    except KeyboardInterrupt:
        retry_while_unavailable(lambda: ledger.requests.release(request, "interrupted"), seconds=5)
        raise
    except GeneratorUnfit as error:
        refusal = f"generator_unfit: {error}"
        results = [Result(retry_while_unavailable(lambda: ledger.reject(request, refusal, None, None)), None, None)]
    except UserError as error:
        reason = f"{type(error).__name__}: {error}"
        results = [Result(retry_while_unavailable(lambda: ledger.requests.fail(request, reason)), None, None)]
    except Exception as error:  # a bug is the request's end, not the end of the queue
        failure = error if isinstance(error, FsuError) else RunFailed(f"{type(error).__name__}: {error}")
        reason = str(failure)
        results = [Result(retry_while_unavailable(lambda: ledger.requests.retry(request, reason)), None, None)]
    if any(result.request.status.is_terminal for result in results):
        retry_while_unavailable(lambda: tidy(ledger, store, request.model))
    return results


def prepare(ledger: Ledger, request: Request) -> Plan:
    """What is to be done about a claimed request, as the ledger is now; raises GeneratorUnfit where the generator that
    it asks for can serve it no more."""
    base = ledger.models.version(request.model)
    root = ledger.models.sealed_root(request.model, base)
    model, named = ledger.models.get(request.model), request.generator
    if named is None:
        offered = offer(ledger, model, base, root, request.recipe)
    else:
        offered = offer_named(ledger, model, root, request.recipe, named)
    return Plan(base, root, offered, make_order(ledger, request, base, root, offered))


def make_order(
    ledger: Ledger, request: Request, base: ModelVersion, root: ModelVersion, offered: GeneratorCandidates
) -> WorkOrder:
    """The work order of `request` on top of version `base`, whose D' has the labels of `root`."""
    asked = ErasureTarget(request.id, request.behaviour, request.samples)
    return replace(
        draft_order(ledger, request.model, asked, request.recipe, base, root),
        reuse=offered.reuse,
        warm=offered.warm,
        transfer=offered.transfer,
        required=offered.required,
        test_set=ledger.models.get(request.model).test_set,
        also=tuple(
            ErasureTarget(each.id, each.behaviour, each.samples) for each in ledger.requests.batch_members(request)
        ),
    )


def draft_order(
    ledger: Ledger, name: str, asked: ErasureTarget, recipe: Recipe, base: ModelVersion, root: ModelVersion
) -> WorkOrder:
    """What erasing `asked` from version `base` of model `name` would begin with, whatever the registry offers."""
    model = ledger.models.get(name)
    return WorkOrder(
        request=asked.request,
        spec=model.spec,
        root_weights=root.weights,
        current_weights=base.weights,
        behaviour=asked.behaviour,
        samples=asked.samples,
        recipe=recipe,
        earlier_erasures=earlier_erasures(ledger, model, base, root),
    )


def run_name(order: WorkOrder) -> str:
    """The name under which a run keeps its checkpoints: they serve another attempt at the very same order alone."""
    return f"{order.request}-{hashlib.sha256(repr(order).encode()).hexdigest()[:8]}"


def settle(ledger: Ledger, request: Request, plan: Plan, outcome: Outcome) -> list[Result]:
    """Judge the outcome and write it down: one transaction, whichever way it goes.

    A coalesced run of which anything is refused is undone: each of its requests is queued again, to run alone.
    """
    reports = [outcome.report, *(part.report for part in outcome.also)]
    refused = (refuse_result(report, request.recipe.gate) for report in reports)
    reason = outcome.reason or next((why for why in refused if why is not None), None)
    if reason is not None and plan.order.also:
        apart = f"coalesced run refused: {reason}"
        return [Result(retry_while_unavailable(lambda: ledger.requests.separate(request, apart)), None, None)]
    reuse, transfer, warm = plan.offered.reuse, plan.offered.transfer, plan.offered.warm or plan.offered.reuse
    links: dict[str, Any] = {
        "generator_id": reuse.id if outcome.generator_use == "reused" and reuse else None,
        "warm_started_from": warm.id if outcome.generator_use == "warm_started" and warm else None,
        "transferred_from": transfer.id if outcome.generator_use == "transferred" and transfer else None,
        "root": plan.root.number,
    }
    if reason is not None:
        rejected = retry_while_unavailable(lambda: ledger.reject(request, reason, outcome, plan.base, **links))
        return [Result(rejected, None, outcome)]
    version = _commit(ledger, request, outcome, plan.base, links)
    ended = retry_while_unavailable(lambda: [ledger.requests.get(asked.request) for asked in plan.order.asked])
    own = (replace(outcome, report=part.report, mask=part.mask, probes=part.probes) for part in outcome.also)
    return [Result(each, version, found) for each, found in zip(ended, (outcome, *own), strict=True)]


def _commit(
    ledger: Ledger, request: Request, outcome: Outcome, base: ModelVersion, links: dict[str, Any]
) -> ModelVersion:
    """The commit, once: where the ledger went away in the middle of it, it is looked up whether it was made."""
    try:
        return retry_while_unavailable(lambda: ledger.commit(request, outcome, base, **links))
    except LeaseLost:
        now = retry_while_unavailable(lambda: ledger.requests.get(request.id))
        if now.status is Status.SUCCEEDED and now.attempt == request.attempt and now.version == base.number + 1:
            version = retry_while_unavailable(lambda: ledger.models.version(request.model, base.number + 1))
            if version.weights == outcome.weights:
                return version
        raise


def retry_while_unavailable(act: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
    """The result of `act`, which is tried again for `seconds` while the ledger's database is away."""
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
    """Renews a lease while the block runs, and sets `stop` when it is lost or `asked` says that all is to stop.

    Raises LeaseLost at the end of the block if the lease was lost.
    """

    def __init__(
        self, renew: Callable[[], object], asked: Callable[[], bool] | None = None, stop: threading.Event | None = None
    ) -> None:
        self._renew, self._asked, self._stop = renew, asked, stop or threading.Event()
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
        due = time.monotonic() + LEASE_SECONDS / 3
        while not self._done.wait(POLL_SECONDS):
            try:
                if self._asked is not None and self._asked():
                    self._stop.set()
                if time.monotonic() >= due:
                    self._renew()
                    due = time.monotonic() + LEASE_SECONDS / 3
            except LeaseLost as error:
                self._lost = error
                self._stop.set()
                return
            except FsuError:  # the ledger is busy or away for a moment: the lease holds for two more tries
                continue
