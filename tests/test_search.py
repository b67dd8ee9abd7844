"""The search for a recipe, on a real Ray of two CPUs: better than the first, the same again, and past a dead driver."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from fsu_ray import search as search_module
from fsu_ray.cluster import workers
from fsu_ray.errors import FsuError, InvalidSamples, TransitionRefused, UserError
from fsu_ray.method.datasets import draw, read_samples, write_samples
from fsu_ray.method.inputs import save_samples
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour
from fsu_ray.search import MARGIN, SearchOptions, SearchResult, _best, search, search_name
from fsu_ray.search_space import SPACE, apply, narrowed
from fsu_ray.service import Service
from fsu_ray.work import ErasureTarget, WorkOrder

FSU = str(Path(sys.executable).parent / "fsu")
TINY = {
    "invert.steps": 80, "invert.batch": 40, "invert.width": 4, "synthesize.per_class": 30, "synthesize.max_draws": 20,
    "synthesize.entropy_threshold": 2.3, "synthesize.starved_below": 0.0, "relearn.epochs": 1, "relearn.lr": 1e-6,
    "relearn.repeats": 1, "gate.forgotten_max": 0.9, "gate.agreement_min": 0.0,
}  # fmt: skip
"""It forgets nothing, so that a search finds something better; the gate is one that so small generators can pass."""

SETS = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
RANGES = (
    "relearn.lr=1e-3:1e-2",
    "relearn.epochs=3:6",
    "synthesize.entropy_threshold=2.3",
    "filter.policy=class,leave-one-out",
)
EIGHT = Behaviour(name="eight", kind="class", targets=(8,))


@pytest.fixture
def asked(service: Service, trained: Any, home: Path) -> ErasureTarget:
    """A model `m`, and a request to erase class 8 from it, which waits."""
    service.models.register("m", trained.spec, trained.weights)
    write_samples(trained.train.pixels[draw(trained.train, [8], 12, 0)], home / "samples")
    request, _ = service.requests.submit("m", EIGHT, str(home / "samples"), apply(Recipe(), TINY))
    return ErasureTarget(request.id, request.behaviour, request.samples)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of its own with two CPUs."""
    workers.connect(2)
    yield
    workers.disconnect()


@pytest.mark.ray
def test_a_search_finds_a_better_recipe(cluster: None, service: Service, asked: ErasureTarget) -> None:
    """By Optuna (by Tune's own draws in the test below). Its values are of the space, its score is above that of the
    recipe that it began with, the evidence says what it took; a trial that ASHA has stopped is no winner."""
    order = service.recipes.search_order("m", asked, apply(Recipe(), TINY))
    wanted = SearchOptions(narrowed(SPACE["class"], RANGES), trials=2, optuna=True, seed=1)
    told: list[str] = []
    result = search(
        order, service.artifacts, (None, service.settings.runs), wanted, lambda stage, *_: told.append(stage)
    )
    assert result.better
    evidence = result.evidence
    assert result.score == evidence["best"]["score"] > evidence["initial"]["score"]
    assert evidence["best"]["forgetting"] > evidence["initial"]["forgetting"]
    assert (evidence["trials"], evidence["name"]) == (2, search_name(order, wanted))
    assert 1 <= evidence["finished"] <= 2
    assert 2 * 80 + 2 * 20 < evidence["steps"] <= 2 * 80 + 2 * 80
    assert evidence["trial_seconds"] > 0
    assert result.recipe == apply(order.recipe, evidence["values"])
    assert result.recipe.relearn.lr >= 1e-3
    assert {"reference", "rungs"} <= set(told)


def worse_and_worse(config: dict[str, Any]) -> None:
    """A trial: each is worse than the one before."""
    for share in search_module.RUNGS:
        tune.report({"score": 1 / (1 + config["values"]["n"]), "steps": int(80 * share)})


@pytest.mark.ray
def test_what_is_worse_than_most_is_stopped_early(
    cluster: None, service: Service, asked: ErasureTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ASHA, by inversion steps: the best trial goes to the end; those that begin when it has reported, and are worse
    than all before them, end at the first rung."""
    monkeypatch.setattr(
        search_module, "_draws", lambda wanted: {"values": tune.grid_search([{"n": n} for n in range(6)])}
    )
    order = service.recipes.search_order("m", asked, apply(Recipe(), TINY))
    wanted = SearchOptions(narrowed(SPACE["class"], RANGES), trials=6)
    results = search_module._tuner(worse_and_worse, order, (None, service.settings.runs), "search-asha", wanted).fit()
    steps = {result.config["values"]["n"]: result.metrics["steps"] for result in results}
    assert steps.pop(0) == 80
    assert steps.pop(1) in (20, 40, 80)  # runs beside the best one
    assert set(steps.values()) == {20}


@pytest.mark.ray
def test_a_search_whose_driver_dies_goes_on_where_it_was(service: Service, asked: ErasureTarget, home: Path) -> None:
    """SIGKILL once a trial has come to its end: the same command again does not run that trial again, and keeps what it
    finds in the ledger, for later requests."""
    words = [FSU, "search", "--model", "m", "--request", asked.request, "--trials", "8", "--cpus", "2", "--json", *SETS]
    words += [word for line in RANGES for word in ("--range", line)]
    with (home / "first.log").open("w") as log:
        driver = subprocess.Popen(words, stdout=log, stderr=log)
        ended: list[Path] = []
        for _ in range(3000):
            time.sleep(0.1)
            ended = [
                file
                for file in Path(service.settings.runs).glob("search-*/*/result.json")
                if '"steps": 80' in file.read_text()
            ]
            if ended and list(Path(service.settings.runs).glob("search-*/experiment_state-*.json")):
                break
            assert driver.poll() is None, (home / "first.log").read_text()
        time.sleep(11)  # Tune writes its state every ten seconds
        assert driver.poll() is None, "it was over before it could be killed"
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = {file: file.read_text().count('"steps": 80') for file in ended}
    again = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)
    assert document["found"]["evidence"]["trials"] == 8
    assert {file: file.read_text().count('"steps": 80') for file in ended} == before
    assert len(list(Path(service.settings.runs).glob("search-*/*/result.json"))) == 8, (
        "no trial was begun a second time"
    )
    kept = service.ledger.recipes.in_force("m", "class")
    assert kept is not None
    assert (kept.id, kept.score) == (document["kept"]["id"], document["found"]["score"])
    chosen = service.recipes.resolve("m", "class")
    assert chosen.recipe.model_dump(mode="json") == document["found"]["recipe"]


def row(score: float, steps: int, **values: Any) -> Any:
    """A trial as Tune gives it back."""
    parts = {"score": score, "forgetting": score, "retention": 1.0, "stability": 1.0, "coverage": 1.0, "reason": ""}

    class Result:
        metrics = {**parts, "steps": steps, "config": {"values": values}}  # noqa: RUF012
        error = None

    return Result


def test_the_best_is_one_that_was_trained_to_the_end() -> None:
    """A higher score at an earlier rung is no recipe; without anything better, the first one stays."""
    base = Recipe()
    results = [row(0.99, 200, **{"relearn.lr": 0.1}), row(0.8, 400, **{"relearn.lr": 0.2}), row(0.7, 400)]
    initial = {**row(0.75, 400).metrics}
    del initial["steps"], initial["config"]
    result = _best(base, initial, results, "search-1", 5.0)
    assert (result.score, result.recipe.relearn.lr, result.better) == (0.8, 0.2, True)
    assert (result.evidence["finished"], result.evidence["steps"]) == (2, 1800)
    initial["score"] = 0.8 - MARGIN / 2  # hardly worse than the best
    assert _best(base, initial, results, "search-1", 5.0).recipe == base
    initial["score"] = 0.85
    assert _best(base, initial, results, "search-1", 5.0) == SearchResult(
        base, 0.85, {**result.evidence, "initial": initial, "best": initial, "values": {}}
    )


def test_what_cannot_be_searched_is_named(service: Service, asked: ErasureTarget, trained: Any, home: Path) -> None:
    """Before Ray is started: the paper's form, one sample, what is no request of the model or has ended."""
    with pytest.raises(UserError, match="needs the continual form"):
        service.recipes.search_order("m", asked, Recipe(form="paper"))
    write_samples(trained.train.pixels[:1], home / "one")
    pixels = read_samples(str(home / "one"), trained.spec.shape)
    digest = service.artifacts.put(save_samples(pixels))
    with pytest.raises(InvalidSamples, match="at least two"):
        service.recipes.search_order("m", ErasureTarget("r", EIGHT, digest), Recipe())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what is to be erased: --request ID, or --behaviour"),
        (["--request", "r", "--behaviour", "x"], "and without --request"),
        (["--behaviour", "x"], "--behaviour goes with --target CLASS and --samples FOLDER"),
        (["--request", "REQUEST", "--range", "relearn.lr=2:1"], "relearn.lr=2:1 is empty"),
        (["--request", "REQUEST", "--trials", "0"], "--trials"),
        (["--request", "REQUEST", "--range", "gate.forgotten_max=0.1:0.9"], "cannot judge gate.forgotten_max"),
        (["--request", "REQUEST", "--range", "invert.steps=100:800"], "cannot judge invert.steps"),
        (["--request", "REQUEST", "--range", "form=paper,continual"], "cannot judge form"),
    ],
)
def test_bad_words_end_a_search_with_2_and_one_line(
    service: Service, asked: ErasureTarget, words: list[str], said: str
) -> None:
    """No traceback, nothing started."""
    from typer.testing import CliRunner

    from fsu_ray.cli import app as fsu

    given = [asked.request if word == "REQUEST" else word for word in words]
    answer = CliRunner().invoke(fsu, ["search", "--model", "m", *given])
    assert answer.exit_code == 2
    assert said in answer.output
    assert "Traceback" not in answer.output


def test_a_search_is_around_the_recipe_that_it_begins_with(
    service: Service, asked: ErasureTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight of a relative BN loss is of another size, unless a line says otherwise. Looked at before any trial."""
    from typer.testing import CliRunner

    from fsu_ray.cli import app as fsu

    spaces = []

    def stopped(order: WorkOrder, store: object, runs: object, options: SearchOptions, *rest: object) -> None:
        spaces.append(options.space["invert.weights.bn"])
        raise TransitionRefused("far enough")

    monkeypatch.setattr("fsu_ray.service.running.on_ray", lambda *_, **__: nullcontext())
    monkeypatch.setattr("fsu_ray.search.search", stopped)
    for words in ([], ["--recipe", "very-deep"], ["--recipe", "very-deep", "--range", "invert.weights.bn=50:60"]):
        answer = CliRunner().invoke(fsu, ["search", "--model", "m", "--request", asked.request, *words])
        assert "far enough" in answer.output
    assert [(line.low, line.high) for line in spaces] == [(1, 30), (10, 300), (50, 60)]


def test_a_request_that_has_ended_is_not_searched_for(service: Service, asked: ErasureTarget) -> None:
    """A cancelled one needs no recipe."""
    service.ledger.requests.cancel(asked.request)
    with pytest.raises(TransitionRefused, match="is cancelled"):
        service.recipes.search("m", request=asked.request)
    assert issubclass(TransitionRefused, FsuError)
