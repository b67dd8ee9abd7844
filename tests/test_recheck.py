"""Probes measured again on a version's weights: the real method on a small classifier, a real ledger and store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray.errors import NotFound, StorageError, UserError
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.method.inputs import save_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.pipeline import run_request
from fsu_ray.recheck import recheck
from fsu_ray.recipes import GateRecipe, Recipe, RelearnRecipe
from fsu_ray.records import Behaviour, Erasure
from fsu_ray.service import Service
from fsu_ray.work import Outcome, TargetResult, WorkOrder

Erase = Callable[..., Erasure]


@pytest.fixture
def erase(service: Service, trained: Any) -> Erase:
    """Commits an erasure of a class to the model `m` that in truth changes nothing: the new version has the weights of
    the trained classifier. `digits` says of which digit the probes are, `recorded` what the report says of them."""
    service.models.register("m", trained.spec, trained.weights)

    def commit(
        target: int, digits: int | None, recorded: float | None = 0.0, gate: GateRecipe | None = None
    ) -> Erasure:
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        recipe = Recipe(gate=gate or GateRecipe())
        request, _ = service.ledger.requests.submit("m", behaviour, f"{target:064}", 8, recipe)
        claimed = service.ledger.requests.claim("tester", 60)
        assert claimed is not None
        chosen = [] if digits is None else draw(trained.train, [digits], 20, 0)
        probes = service.artifacts.put(save_samples(trained.train.pixels[chosen]))
        report = {"forgetting": {"samples_in_target": 0.0, "probes_in_target": recorded}}
        metrics = {"agreement": 0.99, "starved": []}
        target = TargetResult(claimed.id, "c" * 64, probes, report)
        made = ("a" * 64, "b" * 64, metrics, (), service.artifacts.put(trained.weights), (target,), {})
        service.ledger.commit(claimed, Outcome(None, "trained", *made), service.ledger.models.version("m"))
        assert claimed.id == request.id
        return service.ledger.models.erasures("m")[-1]

    return commit


def test_what_the_method_has_erased_is_still_gone(
    service: Service, trained: Any, quick: Recipe, tmp_path: Path
) -> None:
    """The measure of the run that erased it comes out again to the last digit, and a later version is measured too."""

    def here(order: WorkOrder, store: Any, name: str, stop: Any) -> Outcome:
        return unlearn(order, store, torch.device("cpu"))

    service.models.register("m", trained.spec, trained.weights)
    short = {"invert": quick.invert.model_copy(update={"steps": 20, "batch": 40}), "relearn": RelearnRecipe(epochs=1)}
    recipe = quick.model_copy(update=short)
    for target in (8, 3):
        folder = tmp_path / f"class-{target}"
        write_samples(trained.train.pixels[draw(trained.train, [target], 6, 0)], folder)
        service.requests.submit(
            "m", Behaviour(name=f"class-{target}", kind="class", targets=(target,)), str(folder), recipe
        )
        request = service.ledger.requests.claim("tester", 60)
        assert request is not None
        run_request(service.ledger, service.artifacts, here, request)

    _, first, (alone,) = recheck(service.ledger, service.artifacts, "m@2", "ann")
    _, second, both = recheck(service.ledger, service.artifacts, "m", "ann")

    assert (first.number, second.number) == (2, 3)
    assert [each.erasure.behaviour.targets for each in both] == [(8,), (3,)]
    for each in (alone, both[1]):
        forgetting = each.erasure.report["forgetting"]
        assert each.share == each.recorded == forgetting["probes_in_target"]
        assert each.probes == forgetting["probes"] > 0
    assert both[0].share == both[1].erasure.report["earlier"][0]["probes_in_target"]
    kept = service.ledger.models.rechecks("m")
    assert [(kept[each.erasure.id].version, kept[each.erasure.id].share) for each in both] == [
        (3, both[0].share),
        (3, both[1].share),
    ]
    assert all(each.passed and each.actor == "ann" for each in kept.values())


def test_what_is_back_fails_and_what_is_gone_passes(service: Service, erase: Erase) -> None:
    """Both are measured and kept; eights are probes of an eight that was never erased, threes of one that was."""
    gone, back = erase(8, digits=3), erase(5, digits=5)
    told: list[tuple[str, int, int]] = []

    model, version, results = recheck(
        service.ledger, service.artifacts, "m", "ann", lambda *news: told.append(news[:3])
    )

    assert (model.name, version.number) == ("m", 3)
    assert [(each.erasure, each.probes, each.passed) for each in results] == [(gone, 20, True), (back, 20, False)]
    assert results[0].share is not None
    assert results[1].share is not None
    assert results[0].share < 0.05 < 0.8 < results[1].share
    assert told == [("recheck", 1, 2), ("recheck", 2, 2)]
    kept = service.ledger.models.rechecks("m")
    assert {id: (each.share, each.passed) for id, each in kept.items()} == {
        each.erasure.id: (each.share, each.passed) for each in results
    }
    events = [event for event in service.ledger.models.history("m") if "recheck" in event["event"]]
    assert [event["event"] for event in events] == ["rechecked", "recheck_failed"]


@pytest.mark.parametrize(
    ("gate", "recorded", "passed"),
    [
        ({"returned_max": 1.0, "returned_margin": 1.0}, 0.0, True),
        ({"returned_max": 0.5, "returned_margin": 1.0}, 0.0, False),
        ({"returned_max": 1.0, "returned_margin": 0.5}, 0.0, False),
        ({"returned_max": 1.0, "returned_margin": 0.5}, 0.6, True),
        ({"returned_max": 1.0, "returned_margin": 1.0}, None, True),
    ],
)
def test_the_bounds_are_those_of_the_erasures_own_recipe(
    service: Service, erase: Erase, gate: dict[str, float], recorded: float | None, passed: bool
) -> None:
    """Above `returned_max`, or `returned_margin` above its own record."""
    erase(8, digits=8, recorded=recorded, gate=GateRecipe(**gate))
    (result,) = recheck(service.ledger, service.artifacts, "m", "ann")[2]
    assert result.passed == passed
    assert result.recorded == (recorded or 0.0)


def test_a_version_is_asked_for_what_is_in_force_there(service: Service, erase: Erase) -> None:
    """By number or alias; a version from which nothing is gone needs no weights and leaves no trace."""
    eight = erase(8, digits=8)
    erase(5, digits=5)
    service.ledger.models.move_alias("m", "staging", 2, force=True, reason="T-1")

    assert [each.erasure for each in recheck(service.ledger, service.artifacts, "m@staging", "ann")[2]] == [eight]
    assert {each.version for each in service.ledger.models.rechecks("m").values()} == {2}
    service.artifacts.delete(service.ledger.models.version("m", 1).weights)
    assert recheck(service.ledger, service.artifacts, "m@1", "ann")[2] == []


def test_an_erasure_without_probes_passes(service: Service, erase: Erase) -> None:
    """Where there is nothing to measure nothing is held against it, as in the gate."""
    erase(8, digits=None)
    (result,) = recheck(service.ledger, service.artifacts, "m", "ann")[2]
    assert (result.probes, result.share, result.passed) == (0, None, True)


def test_what_is_missing_is_named_and_nothing_is_kept(service: Service, erase: Erase) -> None:
    """Also not what was measured before the probes that are missing."""
    erase(8, digits=8)
    second = erase(5, digits=5)
    service.artifacts.delete(second.probes)
    with pytest.raises(StorageError, match=f"{second.probes} is missing"):
        recheck(service.ledger, service.artifacts, "m", "ann")
    for reference, actor, error in (("m@9", "ann", NotFound), ("x", "ann", NotFound), ("m", "a@b.org", UserError)):
        with pytest.raises(error):
            recheck(service.ledger, service.artifacts, reference, actor)
    assert service.ledger.models.rechecks("m") == {}
