"""What the pipeline makes of each way in which a run can end, on a real ledger, with outcomes that are made up."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fsu_ray.config import Timings
from fsu_ray.errors import GeneratorUnfit, InvalidSamples, LeaseLost, LedgerUnavailable, RunFailed, Stopped
from fsu_ray.pipeline import Heartbeat, Result, WorkerOptions, drain, retry_while_unavailable, run_name, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Digest, ModelSpec, Request, Status
from fsu_ray.service import Service
from fsu_ray.work import Outcome, TargetResult, WorkOrder

SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
FAST = Timings(poll=0.01, lease=0.3, halt=0.5, ledger_wait=1.0)


def digest(text: str) -> Digest:
    """The digest of an artifact that no test stores."""
    return Digest(hashlib.sha256(text.encode()).hexdigest())


def report(share: float = 0.0, agreement: float = 1.0) -> dict[str, Any]:
    """Measures that the gate lets through, unless they are made worse."""
    forgetting = {"samples_in_target": share, "probes_in_target": share, "samples_given": 100, "probes": 100}
    return {"forgetting": forgetting, "retention": {"agreement": agreement}, "earlier": []}


def outcome(order: WorkOrder, **changes: Any) -> Outcome:
    """What a run of `order` brings back that went well."""
    name = order.targets[0].request
    reports = changes.pop("reports", [report()] * len(order.targets))
    targets = tuple(
        TargetResult(target.request, digest(f"mask {target}"), digest(f"probes {target}"), measures)
        for target, measures in zip(order.targets, reports, strict=True)
    )
    values = {
        "reason": None,
        "generator_use": "trained",
        "generator_weights": digest(f"generator of {name}"),
        "dataset": digest(f"dataset of {name}"),
        "metrics": {"agreement": 0.99, "starved": []},
        "refused": (),
        "weights": digest(f"weights of {name}"),
        "targets": targets,
        "seconds": {"invert": 1.0},
    }
    return Outcome(**{**values, **changes})


@pytest.fixture
def ask(service: Service) -> Callable[..., Request]:
    """Queues a request against a model, for one class; registers the model the first time."""

    def submit(target: int, model: str = "m", recipe: Recipe | None = None) -> Request:
        if model not in {known.name for known in service.ledger.models.all()}:
            service.ledger.models.register(model, SPEC, digest("weights"))
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        samples = digest(f"samples of {target}")
        return service.ledger.requests.submit(model, behaviour, samples, 8, recipe or Recipe())[0]

    return submit


def carry_out(service: Service, execute: Callable[..., Outcome], max_batch: int = 0, **more: Any) -> list[Result]:
    """Claim the next request and run it by `execute`, which gets the order and the event `stop`."""
    request = service.ledger.requests.claim("w", 60.0, max_batch=max_batch)
    assert request is not None
    run = lambda order, store, name, stop: execute(order, stop)  # noqa: E731
    return run_request(service.ledger, service.artifacts, run, request, timings=more.pop("timings", FAST), **more)


def raising(error: BaseException) -> Callable[..., Outcome]:
    def execute(order: WorkOrder, stop: threading.Event) -> Outcome:
        raise error

    return execute


def test_a_good_result_is_a_version(service: Service, ask: Callable[..., Request]) -> None:
    request = ask(3)
    (result,) = carry_out(service, lambda order, stop: outcome(order))
    assert (result.request.id, result.request.status, result.request.version) == (request.id, Status.SUCCEEDED, 2)
    assert result.version == service.ledger.models.version("m", 2)
    assert result.version.weights == digest(f"weights of {request.id}")
    assert result.target is not None
    assert result.target.request == request.id
    assert result.report == report()
    (erasure,) = service.ledger.models.erasures("m")
    assert service.ledger.generators.all("m")[0].id == erasure.generator


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reason": "no_samples"}, "no_samples"),
        ({"reports": [report(0.5)]}, "not_forgotten"),
        ({"reports": [report(0.0, 0.5)]}, "retention_lost"),
    ],
)
def test_a_result_that_is_refused_makes_no_version(
    service: Service, ask: Callable[..., Request], changes: dict[str, Any], reason: str
) -> None:
    """By the run itself or by the gate; the outcome is kept."""
    ask(3)
    (result,) = carry_out(service, lambda order, stop: outcome(order, **changes))
    assert (result.request.status, result.version) == (Status.REJECTED, None)
    assert (result.request.reason or "").startswith(reason)
    assert result.outcome is not None
    assert len(service.ledger.models.versions("m")) == 1
    assert len(service.ledger.generators.all("m")) == 1, "its generator may serve another request"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Stopped("asked to"), Status.QUEUED, "stopped with its run"),
        (GeneratorUnfit("starved classes [3]"), Status.REJECTED, "generator_unfit: starved classes [3]"),
        (InvalidSamples("none of them"), Status.FAILED, "InvalidSamples: none of them"),
        (RunFailed("a worker died"), Status.QUEUED, "a worker died"),
        (ZeroDivisionError("a bug"), Status.QUEUED, "ZeroDivisionError: a bug"),
    ],
)
def test_each_error_has_its_state(
    service: Service, ask: Callable[..., Request], error: Exception, status: Status, reason: str
) -> None:
    ask(3)
    (result,) = carry_out(service, raising(error))
    assert (result.request.status, result.version, result.outcome) == (status, None, None)
    assert result.request.reason == reason
    assert (result.request.retry_at is not None) == isinstance(error, RunFailed | ZeroDivisionError)
    assert (result.target, result.report) == (None, {})


def test_an_interrupt_is_raised_and_puts_the_request_back(service: Service, ask: Callable[..., Request]) -> None:
    request = ask(3)
    with pytest.raises(KeyboardInterrupt):
        carry_out(service, raising(KeyboardInterrupt()))
    released = service.ledger.requests.get(request.id)
    assert (released.status, released.reason) == (Status.QUEUED, "interrupted")


def test_a_run_that_is_asked_to_stop_is_told(service: Service, ask: Callable[..., Request]) -> None:
    """By a request to cancel it, or by `halt`."""
    for target, end in ((3, Status.CANCELLED), (4, Status.QUEUED)):
        request, halt = ask(target), threading.Event()

        def wait_to_stop(
            order: WorkOrder, stop: threading.Event, request: Request = request, halt: Any = halt
        ) -> Outcome:
            if request.behaviour.targets == (3,):
                service.ledger.requests.cancel(request.id, "somebody")
            else:
                halt.set()
            assert stop.wait(5)
            raise Stopped("asked to")

        (result,) = carry_out(service, wait_to_stop, halt=halt)
        assert result.request.status is end


def test_a_run_that_is_not_asked_to_stop_goes_on(service: Service, ask: Callable[..., Request]) -> None:
    ask(3)

    def no_stop(order: WorkOrder, stop: threading.Event) -> Outcome:
        assert not stop.wait(0.2)
        return outcome(order)

    (result,) = carry_out(service, no_stop, halt=threading.Event())
    assert result.request.status is Status.SUCCEEDED


def test_a_batch_shares_its_outcome(service: Service, ask: Callable[..., Request]) -> None:
    requests = [ask(target) for target in (3, 4)]
    results = carry_out(service, lambda order, stop: outcome(order, reports=[report(0.01), report(0.02)]), max_batch=5)
    assert [result.request.id for result in results] == [request.id for request in requests]
    assert [result.report["forgetting"]["probes_in_target"] for result in results] == [0.01, 0.02]
    assert {(result.request.status, result.version.number) for result in results} == {(Status.SUCCEEDED, 2)}


def test_a_batch_of_which_one_is_refused_is_run_apart(service: Service, ask: Callable[..., Request]) -> None:
    for target in (3, 4):
        ask(target)
    (result,) = carry_out(service, lambda order, stop: outcome(order, reports=[report(), report(0.5)]), max_batch=5)
    assert (result.request.status, result.version, result.outcome) == (Status.QUEUED, None, None)
    assert (result.request.reason or "").startswith("coalesced run refused: not_forgotten")
    assert [request.no_coalesce for request in service.ledger.requests.all("m")] == [True, True]


def test_the_generator_that_a_run_used_is_on_record(service: Service, ask: Callable[..., Request]) -> None:
    """Reused, or the start of a new one; and the version that labelled D'."""
    for target in (3, 4, 5):
        ask(target)
    carry_out(service, lambda order, stop: outcome(order))
    trained = service.ledger.models.erasures("m")[0].generator
    offers: list[Any] = []

    def reuse(order: WorkOrder, stop: threading.Event) -> Outcome:
        offers.append(order.generators.reuse)
        return outcome(order, generator_use="reused")

    carry_out(service, reuse)
    carry_out(service, lambda order, stop: outcome(order, generator_use="warm_started"))
    assert [offer.id for offer in offers] == [trained]
    erasures = service.ledger.models.erasures("m")
    assert [erasure.generator == trained for erasure in erasures] == [True, True, False]
    generators = {generator.id: generator for generator in service.ledger.generators.all("m")}
    assert len(generators) == 2
    assert generators[erasures[2].generator].warm_started_from == trained
    assert {version.root for version in service.ledger.models.versions("m")} == {1}


def test_a_commit_that_was_made_as_the_ledger_went_away_counts(
    service: Service, ask: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try is refused since the first one is there; with other weights it is somebody else's."""
    commit = service.ledger.commit
    for target, weights in ((3, None), (4, digest("others"))):
        request, calls = ask(target), []

        def away(
            request: Request, outcome: Outcome, *rest: Any, weights: Any = weights, calls: Any = calls, **more: Any
        ) -> Any:
            calls.append(request.id)
            if len(calls) == 1:
                changed = outcome if weights is None else Outcome(**{**vars(outcome), "weights": weights})
                commit(request, changed, *rest, **more)
                raise LedgerUnavailable("the server closed the connection")
            return commit(request, outcome, *rest, **more)

        monkeypatch.setattr(service.ledger, "commit", away)
        if weights is None:
            (result,) = carry_out(service, lambda order, stop: outcome(order))
            assert (result.request.status, result.version) == (Status.SUCCEEDED, service.ledger.models.version("m"))
        else:
            with pytest.raises(LeaseLost):
                carry_out(service, lambda order, stop: outcome(order))
        assert len(calls) == 2
        assert service.ledger.requests.get(request.id).status is Status.SUCCEEDED


def test_a_run_is_named_by_its_request_and_its_whole_order(service: Service, ask: Callable[..., Request]) -> None:
    request, orders = ask(3), []
    carry_out(service, lambda order, stop: (orders.append(order), outcome(order))[1])
    name = run_name(orders[0])
    assert name == f"{request.id}-{hashlib.sha256(repr(orders[0]).encode()).hexdigest()[:8]}"


def drained(service: Service, **options: Any) -> list[Request]:
    """The requests that a worker runs, each of which succeeds."""

    def run(request: Request, halt: threading.Event) -> list[Result]:
        return run_request(
            service.ledger, service.artifacts, lambda order, *_: outcome(order), request, halt=halt, timings=FAST
        )

    return [result.request for result in drain(service.ledger, "w", WorkerOptions(**options), run, FAST)]


def test_a_worker_takes_what_its_options_say(service: Service, ask: Callable[..., Request]) -> None:
    """So many requests, of one model or of all, and nothing after a moment; at last all."""
    ids = [ask(target).id for target in (1, 2, 3)] + [ask(1, "n").id]
    now = datetime.now(UTC)
    assert drained(service, max_requests=0) == []
    assert drained(service, until=now) == []
    assert [request.id for request in drained(service, max_requests=1)] == ids[:1]
    assert [request.id for request in drained(service, model="n")] == ids[3:]
    later = now + timedelta(hours=1)
    assert [request.id for request in drained(service, max_requests=5, until=later)] == ids[1:3]
    assert drained(service) == []


def test_a_batch_counts_by_its_members(service: Service, ask: Callable[..., Request]) -> None:
    for target in (1, 2, 3, 4, 5):
        ask(target)
    assert [request.version for request in drained(service, max_requests=3, coalesce=True)] == [2, 2, 2]
    assert [request.version for request in drained(service, coalesce=True)] == [3, 3]


def test_without_coalescing_each_runs_alone(service: Service, ask: Callable[..., Request]) -> None:
    for target in (1, 2):
        ask(target)
    assert [request.version for request in drained(service)] == [2, 3]


def test_models_run_side_by_side(service: Service, ask: Callable[..., Request]) -> None:
    """Two at a time: each waits for the other to have begun."""
    for model in ("m", "n"):
        ask(1, model)
    both = threading.Barrier(2, timeout=10)

    def run(request: Request, halt: threading.Event) -> list[Result]:
        both.wait()
        return run_request(service.ledger, service.artifacts, lambda order, *_: outcome(order), request, timings=FAST)

    results = drain(service.ledger, "w", WorkerOptions(parallel=2), run, FAST)
    assert {result.request.model for result in results} == {"m", "n"}


@pytest.mark.parametrize("error", [LeaseLost("somebody else has it"), KeyboardInterrupt()])
def test_what_breaks_a_worker_ends_its_other_runs(
    service: Service, ask: Callable[..., Request], error: BaseException
) -> None:
    for model in ("m", "n"):
        ask(1, model)
    both, halted = threading.Barrier(2, timeout=10), []

    def run(request: Request, halt: threading.Event) -> list[Result]:
        both.wait()
        if request.model == "m":
            raise error
        halted.append(halt.wait(5))
        return []

    with pytest.raises(type(error)):
        drain(service.ledger, "w", WorkerOptions(parallel=2), run, FAST)
    assert halted == [True]


def test_an_interrupt_puts_back_a_run_that_does_not_end(service: Service, ask: Callable[..., Request]) -> None:
    """After `timings.halt` seconds; the other has ended, and is left alone."""
    requests = [ask(1, model) for model in ("m", "n")]
    both, released = threading.Barrier(2, timeout=10), threading.Event()

    def run(request: Request, halt: threading.Event) -> list[Result]:
        both.wait()
        if request.model == "m":
            raise KeyboardInterrupt
        deadline = time.monotonic() + 10
        while service.ledger.requests.get(request.id).status is Status.RUNNING and time.monotonic() < deadline:
            time.sleep(0.02)
        released.set()
        return []

    with pytest.raises(KeyboardInterrupt):
        drain(service.ledger, "w", WorkerOptions(parallel=2), run, FAST)
    assert released.is_set()
    ended = [service.ledger.requests.get(request.id) for request in requests]
    assert [(request.status, request.reason) for request in ended] == [
        (Status.RUNNING, None), (Status.QUEUED, "interrupted")
    ]  # fmt: skip


def test_a_single_run_is_in_the_callers_thread(service: Service, ask: Callable[..., Request]) -> None:
    """Where signals arrive."""
    ask(1)
    threads: list[threading.Thread] = []
    drain(service.ledger, "w", WorkerOptions(), lambda *_: threads.append(threading.current_thread()) or [], FAST)
    assert threads == [threading.current_thread()]


def test_a_call_is_tried_again_for_so_many_seconds() -> None:
    """While the ledger is away, and for nothing else; the pause doubles from a quarter of a second."""
    calls: list[float] = []

    def away_once() -> str:
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise LedgerUnavailable("no server")
        return "answer"

    assert retry_while_unavailable(away_once, 5.0) == "answer"
    assert 0.2 < calls[1] - calls[0] < 1.0
    started = time.monotonic()
    with pytest.raises(LedgerUnavailable):
        retry_while_unavailable(lambda: (_ for _ in ()).throw(LedgerUnavailable("no server")), 0.9)
    assert 0.7 < time.monotonic() - started < 1.5, "after pauses of 0.25 and 0.5 the third would end too late"
    with pytest.raises(ZeroDivisionError):
        retry_while_unavailable(lambda: 1 / 0, 5.0)


def test_a_lost_lease_stops_the_run_and_is_raised_at_its_end() -> None:
    """Unless the block ends with an error of its own."""

    def renew() -> None:
        raise LeaseLost("somebody else has it")

    quick = Timings(poll=0.01, lease=0.01)
    for error in (None, Stopped("asked to"), ZeroDivisionError("a bug")):
        stop = threading.Event()
        expected = ZeroDivisionError if isinstance(error, ZeroDivisionError) else LeaseLost
        with pytest.raises(expected), Heartbeat(renew, None, stop, quick):  # noqa: PT012
            assert stop.wait(5)
            if error is not None:
                raise error


def test_a_heartbeat_outlives_a_ledger_that_is_away() -> None:
    calls: list[str] = []

    def renew() -> None:
        calls.append("renew")
        raise LedgerUnavailable("no server")

    with Heartbeat(renew, timings=Timings(poll=0.01, lease=0.01)):
        deadline = time.monotonic() + 5
        while len(calls) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(calls) >= 3


def test_pauses_double_up_to_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("fsu_ray.pipeline.time.sleep", pauses.append)

    def away() -> str:
        if len(pauses) < 7:
            raise LedgerUnavailable("no server")
        return "answer"

    assert retry_while_unavailable(away, 60.0) == "answer"
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_lease_that_is_lost_as_the_block_ends_is_noticed() -> None:
    """The end waits for the renewal that is under way."""
    begun = threading.Event()

    def renew() -> None:
        begun.set()
        time.sleep(0.2)
        raise LeaseLost("somebody else has it")

    with pytest.raises(LeaseLost), Heartbeat(renew, timings=Timings(poll=0.01, lease=0.01)):
        assert begun.wait(5)


def test_a_model_is_tidied_once_a_request_of_it_has_ended(
    service: Service, ask: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while it is to be tried again."""
    tidied: list[str] = []
    monkeypatch.setattr("fsu_ray.pipeline.tidy", lambda ledger, store, model: tidied.append(model))
    ask(3)
    carry_out(service, raising(RunFailed("a worker died")))
    assert tidied == []
    ask(4, "n")
    carry_out(service, lambda order, stop: outcome(order))
    assert tidied == ["n"]


def test_a_lease_is_renewed_after_each_third_of_it() -> None:
    """So two renewals may fail before the lease is over."""
    renewed: list[float] = []
    begun, third = time.monotonic(), 1.0
    with Heartbeat(lambda: renewed.append(time.monotonic()), timings=Timings(poll=0.01, lease=3 * third)):
        while len(renewed) < 2 and time.monotonic() < begun + 10:
            time.sleep(0.01)
    gaps = [renewed[0] - begun, renewed[1] - renewed[0]]
    assert min(gaps) >= third * 0.98
    assert max(gaps) < 1.45 * third, "half of the lease would be 1.5 thirds"
