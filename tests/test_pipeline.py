"""One request from the queue to a terminal state, on a real ledger, with the method in this process."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.cli import _accuracy
from fsu_ray.config import Timings
from fsu_ray.console import plain, results_json
from fsu_ray.errors import AlreadyErased, InvalidSamples, LeaseLost, LedgerUnavailable, RunFailed, Stopped, StorageError
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.method.inputs import load_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.pipeline import Execute, Result, WorkerOptions, drain, run_name, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Digest, Request, Status
from fsu_ray.service import Service
from fsu_ray.work import GeneratorCandidates, Outcome, WorkOrder


def here(order: WorkOrder, store: Any, name: str, stop: Any = None) -> Outcome:
    """The method in this process."""
    return unlearn(order, store, torch.device("cpu"))


@pytest.fixture
def ask(service: Service, trained: Any, quick: Recipe, tmp_path: Path) -> Callable[..., Request]:
    """Registers the model `m` and queues requests against it, each for one class."""
    service.models.register("m", trained.spec, trained.weights, test_set="digits")

    def submit(target: int, recipe: Recipe = quick) -> Request:
        folder = tmp_path / f"class-{target}"
        write_samples(trained.train.pixels[draw(trained.train, [target], 6, 0)], folder)
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        return service.requests.submit("m", behaviour, str(folder), recipe)[0]

    return submit


def carry_out(service: Service, execute: Execute = here, timings: Timings = Timings()) -> Result:
    request = service.ledger.requests.claim("tester", 60)
    assert request is not None
    return run_request(service.ledger, service.artifacts, execute, request, timings=timings)[0]


def gate(recipe: Recipe, **bounds: float) -> Recipe:
    return recipe.model_copy(update={"gate": recipe.gate.model_copy(update=bounds)})


def test_two_requests_in_sequence(service: Service, ask: Callable[..., Request]) -> None:
    """Each makes a version and an erasure; the second reuses the generator, and the history tells all of it."""
    for target in (8, 3):
        ask(target)
    first, second = carry_out(service), carry_out(service)
    assert (first.request.status, second.request.status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    assert first.outcome
    assert second.outcome
    assert (first.outcome.generator_use, second.outcome.generator_use) == ("trained", "reused")
    assert [(v.number, v.parent, v.root) for v in service.ledger.models.versions("m")] == [
        (1, None, 1),
        (2, 1, 1),
        (3, 2, 1),
    ]
    erasures = service.ledger.models.erasures("m")
    assert [e.behaviour.targets for e in erasures] == [(8,), (3,)]
    assert erasures[1].report["earlier"][0]["behaviour"] == "class-8"
    assert erasures[0].generator == erasures[1].generator
    events = [event["event"] for event in service.ledger.models.history("m")]
    assert events.count("erased") == 2
    assert "generator_reused" in events
    for erasure in erasures:
        assert all(service.artifacts.has(digest) for digest in (erasure.samples, erasure.mask, erasure.probes))
    by_class = second.report["test"]["after"]["by_class"]
    assert by_class[8] is not None
    shown = _accuracy(service, [second])
    lines = dict(zip(*(column.cells for column in shown.columns[::2]), strict=True))
    assert {"class 8 (erased)", "class 3 (erased)", "class 5"} <= set(lines)
    kept = [value for k, value in enumerate(by_class) if k not in (8, 3)]
    assert lines["mean of what is kept"] == f"{100 * sum(kept) / len(kept):.2f}"
    with pytest.raises(AlreadyErased, match="class 8 of 'm' is already erased in version 2"):
        service.requests.submit("m", Behaviour(name="again", kind="class", targets=(8,)), "samples", Recipe())


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [({"forgotten_max": 0.0}, "not_forgotten"), ({"agreement_min": 1.0}, "retention_lost")],
)
def test_a_result_that_the_gate_refuses_makes_no_version(
    service: Service, ask: Callable[..., Request], quick: Recipe, bounds: dict[str, float], reason: str
) -> None:
    """`rejected` with the reason and the report; the generator is kept, and no version is made."""
    weak = gate(quick, **bounds)
    lr = 1e-9 if reason == "not_forgotten" else 0.3
    ask(8, weak.model_copy(update={"relearn": weak.relearn.model_copy(update={"lr": lr})}))
    result = carry_out(service)
    assert result.request.status is Status.REJECTED
    assert (result.request.reason or "").startswith(reason)
    assert result.request.report is not None
    assert len(service.ledger.models.versions("m")) == 1
    assert service.ledger.models.erasures("m") == []
    assert len(service.ledger.generators.all("m")) == 1


def test_an_erasure_that_would_come_back_is_rejected(service: Service, ask: Callable[..., Request]) -> None:
    """Earlier probes that answer with their class again end the request as `erasure_returned`."""
    ask(8)
    carry_out(service)
    ask(3, gate(Recipe(), agreement_min=0.0, forgotten_max=1.0))

    def forgetful(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        """A run whose relearning starts from a classifier that still has everything, and learns next to nothing."""
        recipe = order.recipe.model_copy(update={"relearn": order.recipe.relearn.model_copy(update={"lr": 1e-9})})
        return here(
            replace(order, current_weights=order.root_weights, recipe=recipe, generators=GeneratorCandidates()),
            store,
            name,
        )

    ask_recipe_is_slow = forgetful
    request = service.ledger.requests.claim("tester", 60)
    assert request is not None
    quick_inversion = request.recipe.invert.model_copy(update={"steps": 30, "batch": 60, "width": 4})
    loose = request.recipe.synthesize.model_copy(
        update={"per_class": 40, "entropy_threshold": 2.2, "starved_below": 0.0}
    )

    def run(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        recipe = order.recipe.model_copy(update={"invert": quick_inversion, "synthesize": loose})
        return ask_recipe_is_slow(replace(order, recipe=recipe), store, name, stop)

    result = run_request(service.ledger, service.artifacts, run, request)[0]
    assert result.request.status is Status.REJECTED
    assert (result.request.reason or "").startswith("erasure_returned: class-8")
    assert len(service.ledger.models.versions("m")) == 2


@pytest.mark.parametrize("error", [RunFailed("the worker died"), ValueError("a bug"), StorageError("no artifact")])
def test_a_run_that_breaks_is_tried_again(service: Service, ask: Callable[..., Request], error: Exception) -> None:
    """It waits with its reason while the queue goes on; broken three times, it has failed."""

    def broken(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        raise error

    ask(8)
    ask(3)
    result = carry_out(service, broken)
    assert (result.request.status, result.request.failures) == (Status.QUEUED, 1)
    assert str(error) in (result.request.reason or "")
    assert carry_out(service).request.behaviour.targets == (3,)
    for failures in (2, 3):
        forget_backoff(service)
        result = carry_out(service, broken)
        assert result.request.failures == failures
    assert result.request.status is Status.FAILED


def test_what_the_input_is_to_blame_for_is_not_tried_again(service: Service, ask: Callable[..., Request]) -> None:
    """A second try would end the same way."""

    def broken(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        raise InvalidSamples("samples of another size")

    ask(8)
    assert carry_out(service, broken).request.status is Status.FAILED


def forget_backoff(service: Service) -> None:
    with service.ledger.database.autocommit("the queue") as connection:
        connection.exec_driver_sql("UPDATE requests SET retry_at = NULL WHERE status = 'queued'")


FAST = Timings(poll=0.05, lease=0.3, halt=0.2)
"""Looks often whether somebody wants a run to stop, and renews its lease often."""


def test_a_running_request_that_is_cancelled_stops(service: Service, ask: Callable[..., Request]) -> None:
    """The run hears of it while it works; nothing is made of what it had."""

    def until_told(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
        service.ledger.requests.cancel(order.targets[0].request, "alice")
        assert stop.wait(10)
        raise Stopped("the run was stopped in invert at 20 of 60")

    ask(8)
    result = carry_out(service, until_told, FAST)
    assert result.request.status is Status.CANCELLED
    assert [(e.new, e.actor) for e in service.ledger.requests.events(result.request.id)][-1] == (
        Status.CANCELLED,
        "alice",
    )
    assert len(service.ledger.models.versions("m")) == 1


def test_a_run_whose_lease_is_lost_is_told_to_stop(service: Service, ask: Callable[..., Request]) -> None:
    """It would only spoil the checkpoints of the attempt that has taken over."""
    told: list[bool] = []

    def until_told(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
        assert service.ledger.requests.claim("another", 60) is not None
        told.append(stop.wait(10))
        raise Stopped("the run was stopped")

    ask(8)
    request = service.ledger.requests.claim("tester", 0.0)
    assert request is not None
    with pytest.raises(LeaseLost):
        run_request(service.ledger, service.artifacts, until_told, request, timings=FAST)
    assert told == [True]
    assert service.ledger.requests.get(request.id).worker == "another"


def test_an_interrupt_puts_the_request_back(service: Service, ask: Callable[..., Request]) -> None:
    """Ctrl-C is no failure: the next attempt is free to begin at once."""

    def interrupted(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        raise KeyboardInterrupt

    request = ask(8)
    with pytest.raises(KeyboardInterrupt):
        carry_out(service, interrupted)
    now = service.ledger.requests.get(request.id)
    assert (now.status, now.reason, now.failures) == (Status.QUEUED, "interrupted", 0)
    assert carry_out(service).request.status is Status.SUCCEEDED


def test_the_end_of_a_run_waits_for_a_ledger_that_is_away(
    service: Service, ask: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is tried until the database is back; one that was made before the connection broke is found."""
    commit, tries = service.ledger.commit, []

    def away(*arguments: Any, **links: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise LedgerUnavailable("the server closed the connection")
        version = commit(*arguments, **links)
        if len(tries) == 2:
            raise LedgerUnavailable("the server closed the connection after the commit")
        return version

    monkeypatch.setattr(service.ledger, "commit", away)
    ask(8)
    result = carry_out(service)
    assert len(tries) == 3
    assert result.request.status is Status.SUCCEEDED
    assert result.version is not None
    assert [version.number for version in service.ledger.models.versions("m")] == [1, 2]


def test_class_requests_of_a_model_run_together(service: Service, ask: Callable[..., Request], quick: Recipe) -> None:
    """One inversion, one mask each, one relearning, one version, one erasure a request with its own measures."""
    thorough = quick.model_copy(update={"relearn": quick.relearn.model_copy(update={"epochs": 15, "lr": 3e-3})})
    for target in (8, 3, 5):
        ask(target, thorough)
    wanted = WorkerOptions(coalesce=True)
    results = drain(
        service.ledger, "w", wanted, functools.partial(run_request, service.ledger, service.artifacts, here)
    )
    assert [r.request.behaviour.targets for r in results] == [(8,), (3,), (5,)]
    assert {(r.request.status, r.request.version) for r in results} == {(Status.SUCCEEDED, 2)}
    erasures = service.ledger.models.erasures("m")
    assert len({e.mask for e in erasures}) == len({e.probes for e in erasures}) == 3
    assert [r.target and (r.target.mask, r.target.probes) for r in results] == [(e.mask, e.probes) for e in erasures]
    documents = results_json(results)
    assert [document["outcome"]["mask"] for document in documents] == [erasure.mask for erasure in erasures]
    assert [document["outcome"]["report"] for document in documents] == [plain(result.report) for result in results]
    assert set(documents[0]) == {"request", "version", "outcome"}
    assert set(documents[0]["outcome"]) == {
        "reason", "generator_use", "generator_weights", "dataset", "metrics", "refused", "weights", "mask", "probes",
        "report", "seconds", "resumed",
    }  # fmt: skip
    assert len(service.ledger.generators.all("m")) == 1
    for erasure in erasures:
        forgot = erasure.report["forgetting"]
        assert forgot["probes"] == len(load_samples(service.artifacts.get(erasure.probes)))
        before, after = erasure.report["test"]["before"], erasure.report["test"]["after"]
        assert before["by_class"][erasure.behaviour.targets[0]] > 0.9
        assert after["by_class"][erasure.behaviour.targets[0]] < 0.2
    ask(1, thorough)
    later = carry_out(service)
    assert later.outcome
    assert later.outcome.generator_use == "reused"
    assert [prior["behaviour"] for prior in later.report["earlier"]] == ["class-8", "class-3", "class-5"]


def test_a_coalesced_run_that_is_refused_is_undone(
    service: Service, ask: Callable[..., Request], quick: Recipe
) -> None:
    """No request suffers for another one: each runs alone then, from the beginning."""
    strict = gate(quick, agreement_min=1.0)
    for target in (8, 3):
        ask(target, strict.model_copy(update={"relearn": strict.relearn.model_copy(update={"lr": 0.3})}))
    claimed = service.ledger.requests.claim("tester", 60, max_batch=9)
    assert claimed is not None
    (result,) = run_request(service.ledger, service.artifacts, here, claimed)
    assert result.request.status is Status.QUEUED
    assert (result.request.reason or "").startswith("coalesced run refused: retention_lost")
    assert all(request.no_coalesce for request in service.ledger.requests.all("m"))
    assert service.ledger.models.erasures("m") == []
    alone = service.ledger.requests.claim("tester", 60, max_batch=9)
    assert alone is not None
    assert service.ledger.requests.batch_members(alone) == []


def test_models_run_side_by_side(service: Service, ask: Callable[..., Request], trained: Any, tmp_path: Path) -> None:
    """Two runs are under way at one moment in a worker that may have two, never more."""
    ask(8)
    for name in ("n", "o"):
        service.models.register(name, trained.spec, trained.weights)
        behaviour = Behaviour(name="x", kind="class", targets=(8,))
        service.requests.submit(name, behaviour, str(tmp_path / "class-8"), Recipe())
    under_way, seen = [], []
    both = threading.Barrier(2)

    def meet(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        under_way.append(name)
        seen.append(len(under_way))
        if len(seen) <= 2:
            both.wait(10)
        under_way.remove(name)
        raise InvalidSamples("enough")

    run = functools.partial(run_request, service.ledger, service.artifacts, meet)
    results = drain(service.ledger, "w", WorkerOptions(parallel=2), run)
    assert len(results) == 3
    assert max(seen) == 2


def test_an_interrupt_ends_all_runs_of_a_worker(
    service: Service, ask: Callable[..., Request], trained: Any, home: Path
) -> None:
    """Those that are under way are put back at their next step, and none that waits is begun."""
    ask(8)
    for name in ("n", "o"):
        service.models.register(name, trained.spec, trained.weights)
        service.requests.submit(name, Behaviour(name="x", kind="class", targets=(8,)), str(home / "class-8"), Recipe())
    both, main = threading.Barrier(2), threading.get_ident()

    def until_told(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
        if both.wait(10) == 0:
            signal.pthread_kill(main, signal.SIGINT)
        assert stop.wait(10)
        raise Stopped("the run was stopped")

    with pytest.raises(KeyboardInterrupt):
        drain(
            service.ledger,
            "w",
            WorkerOptions(parallel=2),
            functools.partial(run_request, service.ledger, service.artifacts, until_told, timings=FAST),
            replace(FAST, halt=40.0),
        )
    assert {request.status for request in service.ledger.requests.all()} == {Status.QUEUED}
    assert sorted(request.attempt for request in service.ledger.requests.all()) == [0, 1, 1]


def test_a_run_that_hears_nothing_gives_its_request_back(
    service: Service, ask: Callable[..., Request], trained: Any, home: Path
) -> None:
    """It waits for a node of the cluster, say: it has no next step, and whoever has sent the interrupt kills soon."""
    deaf = ask(8).id
    service.models.register("n", trained.spec, trained.weights)
    service.requests.submit("n", Behaviour(name="x", kind="class", targets=(8,)), str(home / "class-8"), Recipe())
    both, main, given_back = threading.Barrier(2), threading.get_ident(), threading.Event()

    def run(request: Request, halt: threading.Event) -> list[Result]:
        if both.wait(10) == 0:
            signal.pthread_kill(main, signal.SIGINT)
        if request.id == deaf:
            for _ in range(200):
                time.sleep(0.05)
                if service.ledger.requests.get(deaf).status is Status.QUEUED:
                    given_back.set()
                    break
        elif halt.wait(10):
            service.ledger.requests.release(request, "interrupted")
        return []

    with pytest.raises(KeyboardInterrupt):
        drain(service.ledger, "w", WorkerOptions(parallel=2), run, FAST)
    assert given_back.is_set()
    assert {request.status for request in service.ledger.requests.all()} == {Status.QUEUED}
    assert {request.failures for request in service.ledger.requests.all()} == {0}


def test_nothing_new_begins_after_the_end_of_a_window(service: Service, ask: Callable[..., Request]) -> None:
    """`until` bounds claims, `most` the number of requests."""
    for target in (8, 3, 5):
        ask(target)
    run = functools.partial(run_request, service.ledger, service.artifacts, here)
    assert drain(service.ledger, "w", WorkerOptions(until=datetime.now(UTC)), run) == []
    assert len(drain(service.ledger, "w", WorkerOptions(max_requests=2, coalesce=True), run)) == 2
    assert service.ledger.requests.claimable("m")


def test_checkpoints_serve_the_same_order_alone(service: Service, ask: Callable[..., Request]) -> None:
    """A run that stopped on one version must not go on from its weights on top of another."""
    request = ask(8)
    claimed = service.ledger.requests.claim("tester", 60)
    assert claimed is not None
    orders = [service.ledger.plan(claimed).order for _ in range(2)]
    names = [run_name(order) for order in orders]
    service.ledger.requests.release(claimed, "interrupted")
    service.models.update("m", service.artifacts.get(service.ledger.models.version("m").weights))
    other = run_name(service.ledger.plan(claimed).order)
    assert names[0] == names[1]
    assert names[0].startswith(request.id)
    assert other == names[0], "the very same weights: the same order"
    assert run_name(replace(orders[0], current_weights=Digest("0" * 64))) != names[0]


def test_a_worker_that_was_taken_over_writes_nothing(service: Service, ask: Callable[..., Request]) -> None:
    """The lease ends during the run, another worker claims, and the first one's commit is refused."""

    def slow(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        outcome = here(order, store, name)
        assert service.ledger.requests.claim("another", 60) is not None
        return outcome

    ask(8)
    request = service.ledger.requests.claim("tester", 0.0)
    assert request is not None
    with pytest.raises(LeaseLost):
        run_request(service.ledger, service.artifacts, slow, request)
    now = service.ledger.requests.get(request.id)
    assert (now.status, now.worker, now.attempt) == (Status.RUNNING, "another", 2)
    assert len(service.ledger.models.versions("m")) == 1


def test_a_version_from_outside_is_a_new_root(service: Service, ask: Callable[..., Request], trained: Any) -> None:
    """After `model update` the old D' is not offered: a generator is trained from the old one's weights."""
    ask(8)
    carry_out(service)
    version = service.models.update("m", service.artifacts.get(service.ledger.models.version("m").weights))
    assert (version.number, version.root) == (3, 3)
    ask(3)
    result = carry_out(service)
    assert result.outcome
    assert result.outcome.generator_use == "warm_started"
    assert service.ledger.generators.all("m")[-1].root == 3
