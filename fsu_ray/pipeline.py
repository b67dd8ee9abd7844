"""One request, its steps in order. The driver looks at digests and figures, never at images.

claim ──> offer (registry) ──> work order ──> one Ray Train run ──> judge ──> commit or reject
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fsu_ray.config import LEASE_SECONDS
from fsu_ray.errors import FsuError, LeaseLost, RunFailed, TransitionRefused
from fsu_ray.gate import refuse_result
from fsu_ray.records import BlobStore, ModelVersion, Outcome, Request, WorkOrder
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.registry import Offer, offer, priors

Execute = Callable[[WorkOrder, BlobStore, str], Outcome]


@dataclass(frozen=True)
class Result:
    """How a request ended: its last state in the ledger, its new version and the outcome of its run, if any."""

    request: Request
    version: ModelVersion | None
    outcome: Outcome | None


def drain(
    ledger: Ledger, worker: str, most: int | None, model: str | None, run: Callable[[Request], Result]
) -> list[Result]:
    """Claim and run what is queued, one request after another, at most `most`."""
    results: list[Result] = []
    while most is None or len(results) < most:
        request = ledger.claim(worker, LEASE_SECONDS, model)
        if request is None:
            break
        results.append(run(request))
    return results


def run_request(ledger: Ledger, store: BlobStore, execute: Execute, request: Request) -> Result:
    """Carry out a claimed request to a terminal state.

    `execute(order, store, name)` runs the method, on Ray or in this process. What is raised by it
    ends the request as `failed` and is not raised again; a lost lease is, since somebody else has
    the request then. An interrupt leaves the request `running`: its lease ends and the next attempt
    goes on from the last checkpoint.
    """
    base = ledger.version(request.model)
    offered = _offer(ledger, request, base)
    order = make_order(ledger, request, base, offered)
    try:
        with _Heartbeat(ledger, request):
            outcome = execute(order, store, request.id)
    except LeaseLost:
        raise
    except FsuError as error:
        return Result(ledger.fail(request, str(error)), None, None)
    except Exception as error:  # a bug is the request's end, not the end of the queue
        failure = RunFailed(f"{type(error).__name__}: {error}".splitlines()[0])
        return Result(ledger.fail(request, str(failure)), None, None)
    try:
        return settle(ledger, request, base, offered, outcome)
    except LeaseLost:
        raise
    except TransitionRefused as error:  # the line moved on under this run: its result has no parent any more
        return Result(ledger.fail(request, str(error)), None, outcome)


def make_order(ledger: Ledger, request: Request, base: ModelVersion, offered: Offer) -> WorkOrder:
    """The work order of `request` on top of version `base`."""
    model = ledger.model(request.model)
    return WorkOrder(
        request=request.id,
        spec=model.spec,
        root_weights=ledger.version(request.model, base.root).weights,
        current_weights=base.weights,
        behaviour=request.behaviour,
        samples=request.samples,
        recipe=request.recipe,
        priors=priors(ledger, model, base),
        reuse=offered.reuse,
        warm=offered.warm,
        test_set=model.test_set,
    )


def _offer(ledger: Ledger, request: Request, base: ModelVersion) -> Offer:
    return offer(ledger, ledger.model(request.model), base, request.recipe)


def settle(ledger: Ledger, request: Request, base: ModelVersion, offered: Offer, outcome: Outcome) -> Result:
    """Judge the outcome and write it down: one transaction, whichever way it goes."""
    reason = outcome.reason or refuse_result(outcome.report, request.recipe.gate)
    warm = offered.warm or offered.reuse
    links: dict[str, Any] = {
        "generator_id": offered.reuse.id if outcome.generator_use == "reused" and offered.reuse else None,
        "warm_started_from": warm.id if outcome.generator_use == "warm_started" and warm else None,
    }
    if reason is not None:
        return Result(ledger.reject(request, reason, outcome, base, **links), None, outcome)
    version = ledger.commit(request, outcome, base, **links)
    return Result(ledger.request(request.id), version, outcome)


class _Heartbeat:
    """Renews the lease of a request while the block runs; raises LeaseLost at its end if it was lost."""

    def __init__(self, ledger: Ledger, request: Request) -> None:
        self._ledger, self._request = ledger, request
        self._done = threading.Event()
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._lost is not None and kind is None:
            raise self._lost

    def _beat(self) -> None:
        while not self._done.wait(LEASE_SECONDS / 3):
            try:
                self._ledger.heartbeat(self._request, LEASE_SECONDS)
            except LeaseLost as error:
                self._lost = error
                return
            except FsuError:  # the ledger is busy or away for a moment: the lease holds for two more tries
                continue
