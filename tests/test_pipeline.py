"""One request from the queue to a terminal state, on a real ledger, with the method in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.app import App
from fsu_ray.errors import AlreadyErased, LeaseLost, RunFailed
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.pipeline import Execute, Result, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Request, Status
from fsu_ray.work import Outcome, WorkOrder


def here(order: WorkOrder, store: Any, name: str, stop: Any = None) -> Outcome:
    """The method in this process."""
    return unlearn(order, store, torch.device("cpu"))


@pytest.fixture
def ask(app: App, trained: Any, quick: Recipe, tmp_path: Path) -> Callable[..., Request]:
    """Registers the model `m` and queues requests against it, each for one class."""
    app.register("m", trained.spec, trained.weights, test_set="digits")

    def submit(target: int, recipe: Recipe = quick) -> Request:
        folder = tmp_path / f"class-{target}"
        write_samples(trained.train.pixels[draw(trained.train, [target], 6, 0)], folder)
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        return app.submit("m", behaviour, str(folder), recipe)[0]

    return submit


def carry_out(app: App, execute: Execute = here) -> Result:
    request = app.ledger.claim("tester", 60)
    assert request is not None
    return run_request(app.ledger, app.artifacts, execute, request)[0]


def gate(recipe: Recipe, **bounds: float) -> Recipe:
    return recipe.model_copy(update={"gate": recipe.gate.model_copy(update=bounds)})


def test_two_requests_in_sequence(app: App, ask: Callable[..., Request]) -> None:
    """Each makes a version and an erasure; the second reuses the generator, and the history tells all of it."""
    for target in (8, 3):
        ask(target)
    first, second = carry_out(app), carry_out(app)
    assert (first.request.status, second.request.status) == (Status.SUCCEEDED, Status.SUCCEEDED)
    assert first.outcome
    assert second.outcome
    assert (first.outcome.generator_use, second.outcome.generator_use) == ("trained", "reused")
    assert [(v.number, v.parent, v.root) for v in app.ledger.versions("m")] == [(1, None, 1), (2, 1, 1), (3, 2, 1)]
    erasures = app.ledger.erasures("m")
    assert [e.behaviour.targets for e in erasures] == [(8,), (3,)]
    assert erasures[1].report["earlier"][0]["behaviour"] == "class-8"
    assert erasures[0].generator == erasures[1].generator
    events = [event["event"] for event in app.ledger.history("m")]
    assert events.count("erased") == 2
    assert "generator_reused" in events
    for erasure in erasures:
        assert all(app.artifacts.has(digest) for digest in (erasure.samples, erasure.mask, erasure.probes))
    assert second.outcome.report["test"]["after"]["by_class"][8] is not None
    with pytest.raises(AlreadyErased, match="class 8 of 'm' is already erased in version 2"):
        app.submit("m", Behaviour(name="again", kind="class", targets=(8,)), "samples", Recipe())


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [({"forgotten_max": 0.0}, "not_forgotten"), ({"agreement_min": 1.0}, "retention_lost")],
)
def test_a_result_that_the_gate_refuses_makes_no_version(
    app: App, ask: Callable[..., Request], quick: Recipe, bounds: dict[str, float], reason: str
) -> None:
    """`rejected` with the reason and the report; the generator is kept, and no version is made."""
    weak = gate(quick, **bounds)
    lr = 1e-9 if reason == "not_forgotten" else 0.3
    ask(8, weak.model_copy(update={"relearn": weak.relearn.model_copy(update={"lr": lr})}))
    result = carry_out(app)
    assert result.request.status is Status.REJECTED
    assert (result.request.reason or "").startswith(reason)
    assert result.request.report is not None
    assert len(app.ledger.versions("m")) == 1
    assert app.ledger.erasures("m") == []
    assert len(app.ledger.generators("m")) == 1


def test_an_erasure_that_would_come_back_is_rejected(app: App, ask: Callable[..., Request]) -> None:
    """Earlier probes that answer with their class again end the request as `erasure_returned`."""
    ask(8)
    carry_out(app)
    ask(3, gate(Recipe(), agreement_min=0.0, forgotten_max=1.0))

    def forgetful(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        """A run whose relearning starts from a classifier that still has everything, and learns next to nothing."""
        recipe = order.recipe.model_copy(update={"relearn": order.recipe.relearn.model_copy(update={"lr": 1e-9})})
        return here(replace(order, current_weights=order.root_weights, recipe=recipe, reuse=None), store, name)

    ask_recipe_is_slow = forgetful
    request = app.ledger.claim("tester", 60)
    assert request is not None
    quick_inversion = request.recipe.invert.model_copy(update={"steps": 30, "batch": 60, "width": 4})
    loose = request.recipe.synthesize.model_copy(
        update={"per_class": 40, "entropy_threshold": 2.2, "starved_below": 0.0}
    )

    def run(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        recipe = order.recipe.model_copy(update={"invert": quick_inversion, "synthesize": loose})
        return ask_recipe_is_slow(replace(order, recipe=recipe), store, name, stop)

    result = run_request(app.ledger, app.artifacts, run, request)[0]
    assert result.request.status is Status.REJECTED
    assert (result.request.reason or "").startswith("erasure_returned: class-8")
    assert len(app.ledger.versions("m")) == 2


@pytest.mark.parametrize("error", [RunFailed("the worker died"), ValueError("a bug")])
def test_a_run_that_breaks_ends_as_failed(app: App, ask: Callable[..., Request], error: Exception) -> None:
    """The reason is kept, and the queue goes on."""

    def broken(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        raise error

    ask(8)
    ask(3)
    result = carry_out(app, broken)
    assert result.request.status is Status.FAILED
    assert str(error) in (result.request.reason or "")
    assert carry_out(app).request.status is Status.SUCCEEDED


def test_a_worker_that_was_taken_over_writes_nothing(app: App, ask: Callable[..., Request]) -> None:
    """The lease ends during the run, another worker claims, and the first one's commit is refused."""

    def slow(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        outcome = here(order, store, name)
        assert app.ledger.claim("another", 60) is not None
        return outcome

    ask(8)
    request = app.ledger.claim("tester", 0.0)
    assert request is not None
    with pytest.raises(LeaseLost):
        run_request(app.ledger, app.artifacts, slow, request)
    now = app.ledger.request(request.id)
    assert (now.status, now.worker, now.attempt) == (Status.RUNNING, "another", 2)
    assert len(app.ledger.versions("m")) == 1


def test_a_version_from_outside_is_a_new_root(app: App, ask: Callable[..., Request], trained: Any) -> None:
    """After `model update` the old D' is not offered: a generator is trained from the old one's weights."""
    ask(8)
    carry_out(app)
    version = app.update("m", app.artifacts.get(app.ledger.version("m").weights))
    assert (version.number, version.root) == (3, 3)
    ask(3)
    result = carry_out(app)
    assert result.outcome
    assert result.outcome.generator_use == "warm_started"
    assert app.ledger.generators("m")[-1].root == 3
