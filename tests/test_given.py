"""Generators that are given: imported ones, and those that a request asks for, of its model or of another one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from typer.testing import CliRunner, Result

from fsu_ray import pipeline
from fsu_ray.cli import app as commands
from fsu_ray.errors import TransitionRefused
from fsu_ray.method.baselines.gan import GanRecipe, train
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.method.unlearn import RunState, unlearn
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator
from fsu_ray.pipeline import run_request
from fsu_ray.records import Generator as Kept
from fsu_ray.records import Request, Status
from fsu_ray.service import Service
from fsu_ray.storage import bundle
from fsu_ray.work import Outcome, WorkOrder

CHANGES = {"synthesize.per_class": 40, "synthesize.max_draws": 8, "invert.steps": 24, "invert.batch": 30,
           "relearn.lr": 3e-3, "relearn.epochs": 8}  # fmt: skip
QUICK = tuple(word for key, value in CHANGES.items() for word in ("--set", f"{key}={value}"))
NONE_PASS = ("--set", "gate.bn_distance_max=0")
Fsu = Callable[..., Result]


@pytest.fixture(scope="session")
def painted(trained: Any) -> bytes:
    """The weights of a generator of the digits, trained as a GAN: good enough for every gate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = GanRecipe(steps=200, batch=32, width=4, latent=16, critic_width=8, precision="float32")
    made = train(trained.spec, trained.train.pixels, trained.train.labels, recipe, torch.device("cpu"))
    torch.set_num_threads(threads)
    return save_tensors({name: t.contiguous() for name, t in made.state_dict().items()})


@pytest.fixture
def fsu(service: Service, home: Path, trained: Any, painted: bytes, monkeypatch: pytest.MonkeyPatch) -> Fsu:
    """Types a command in a folder with the model `m`, `n`, which calls each digit k + 1, and the generator g.st."""
    monkeypatch.delenv("FSU_ACTOR", raising=False)
    service.models.register("m", trained.spec, trained.weights)
    tensors = load_tensors(trained.weights)
    tensors |= {f"fc3.{name}": tensors[f"fc3.{name}"].roll(1, 0) for name in ("weight", "bias")}
    service.models.register("n", trained.spec, save_tensors(tensors))
    (home / "g.st").write_bytes(painted)

    def run(*words: str) -> Result:
        return CliRunner().invoke(commands, [str(word) for word in words])

    return run


@pytest.fixture
def submit(fsu: Fsu, trained: Any, home: Path) -> Callable[..., Result]:
    """Submits a request for `m`, or another model, to forget what shows one digit."""

    def typed(digit: int, *more: str, model: str = "m") -> Result:
        if not (home / f"of-{digit}").exists():
            write_samples(trained.train.pixels[draw(trained.train, [digit], 6, 0)], home / f"of-{digit}")
        target = digit if model != "n" else (digit + 1) % 10
        return fsu(
            "request", "submit", "--model", model, "--behaviour", f"digit-{digit}", "--target", target,
            "--samples", f"of-{digit}", *QUICK, *more,
        )  # fmt: skip

    return typed


def import_it(fsu: Fsu, service: Service, *more: str, model: str = "m") -> Kept:
    done = fsu("generator", "import", model, "g.st", "--latent", "16", *QUICK, *more)
    assert done.exit_code == 0, done.output
    return service.ledger.generators.all(model)[-1]


def here(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
    """The method in this process."""
    return unlearn(order, store, torch.device("cpu"))


def never(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
    """Of a request that must not come to this."""
    pytest.fail("the method ran")


def carry_out(service: Service, execute: pipeline.Execute = here) -> Request:
    request = service.ledger.requests.claim("tester", 60)
    assert request is not None
    return run_request(service.ledger, service.artifacts, execute, request)[0].request


def sound(service: Service) -> None:
    """The audit finds nothing, of the ledger, its artifacts, and a bundle of both."""
    service.ledger.database.flush()
    found = service.ledger.audit.verify(service.artifacts)
    assert (found.findings, found.waiting) == ((), 0)
    file = service.settings.home / f"bundle-{found.events}.jsonl"
    bundle.write(service.ledger, file, "jsonl")
    assert bundle.verify(file).verdict.findings == ()


def refused(result: Result, words: str, code: int = 2) -> None:
    """One line that says `words`, no traceback."""
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1


def test_an_imported_generator_serves_in_the_place_of_an_inverter(fsu: Fsu, service: Service, submit: Any) -> None:
    """With D' and figures, under gates that let little pass; on record, and no inversion is run."""
    said = fsu("generator", "import", "m", "g.st", "--latent", "16", *QUICK, "--by", "alice").stdout
    assert "agreement 1.000" in said
    assert "the gate would refuse" not in said
    (kept,) = service.ledger.generators.all("m")
    assert (kept.origin, kept.request, kept.root) == ("imported", None, 1)
    assert kept.metrics["acceptance"] > 0.9
    assert len(Synthetic.from_bytes(service.artifacts.get(kept.dataset))) == 400
    submit(8)
    done = carry_out(service)
    assert done.status is Status.SUCCEEDED, done.reason
    assert done.report is not None
    assert (done.report["generator"]["use"], done.report["generator"]["id"]) == ("reused", kept.id)
    assert "invert" not in done.report["seconds"]
    assert service.ledger.generators.all("m")[0].taints == len(service.ledger.generators.all("m")) == 1
    events = {event["event"]: event for event in service.ledger.models.history("m")}
    assert (events["generator_imported"]["request"], events["generator_reused"]["request"]) == (None, done.id)
    logged = json.loads(fsu("audit", "log", "--json").stdout)
    assert [event["actor"] for event in logged if event["event"] == "generator_imported"] == ["alice"]
    assert "imported" in fsu("generator", "show", kept.id).stdout
    assert "imported" in fsu("generator", "list").stdout
    sound(service)


def test_what_was_erased_before_is_masked_in_the_d_of_an_import(fsu: Fsu, service: Service, submit: Any) -> None:
    """Its figures are those for the latest version; later requests measure the earlier erasure again."""
    first = import_it(fsu, service)
    submit(8)
    carry_out(service)
    second = import_it(fsu, service, "--set", "synthesize.seed=1")
    assert second.metrics["agreement"] > 0.95, "without a mask the eights disagree"
    assert second.dataset != first.dataset
    submit(3, "--set", "synthesize.seed=1")
    done = carry_out(service)
    assert done.status is Status.SUCCEEDED, done.reason
    assert done.report is not None
    assert done.report["generator"]["id"] == second.id
    assert done.report["earlier"][0]["behaviour"] == "digit-8"
    sound(service)


def other_weights(trained: Any, **changes: int) -> bytes:
    spec = trained.spec.model_copy(update=changes)
    return save_tensors({name: t.contiguous() for name, t in Generator(spec, 4, 16).state_dict().items()})


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (None, (), "no weights at"),
        (b"no safetensors", (), "not a whole safetensors file"),
        (b"PK pickled", (), "are a pickle"),
        ("cut", (), "not a whole safetensors file"),
        ("classifier", (), "the weights do not fit a generator of 1x16x16"),
        ({"height": 20}, (), "the weights do not fit a generator of 1x16x16: 'linear.weight' is"),
        ({"channels": 3}, (), "the generator draws 3 channels, the model takes 1"),
        ({"classes": 7}, (), "the generator takes 23 inputs, not 16 dimensions of z and 10 classes"),
        ({"classes": 30}, (), "takes 46 inputs"),
        ({}, ("--latent", "15"), "if its z has 16, give --latent 16"),
        ({}, ("--recipe", "paper"), "the paper's form draws D' anew"),
        ({}, ("--set", "synthesize.entropy_threshold=1e-9"), "passes the tests of eq. 8"),
        ({}, ("--kind", "some"), "no kind 'some'"),
        ({}, ("--by", "a b"), "a b"),
    ],
)
def test_what_cannot_be_imported(
    fsu: Fsu, service: Service, trained: Any, painted: bytes, home: Path, content: Any, more: Any, words: str
) -> None:
    """One line, and nothing in the ledger."""
    named = {"cut": painted[:-9], "classifier": trained.weights, "none": painted}
    if isinstance(content, dict):
        content = other_weights(trained, **content) if content else painted
    if content is None:
        (home / "g.st").unlink()
    else:
        (home / "g.st").write_bytes(named.get(content, content))
    before = service.artifacts.digests().keys()
    refused(fsu("generator", "import", "m", "g.st", *("--latent", "16"), *QUICK, *more), words)
    assert service.ledger.generators.all() == []
    if "--by" not in more:
        assert service.artifacts.digests().keys() == before


def test_one_import_is_enough(fsu: Fsu, service: Service) -> None:
    """The same weights for the same recipe are there; for a model that is not there, or retired, they are not."""
    kept = import_it(fsu, service)
    again = ("generator", "import", "m", "g.st", "--latent", "16", *QUICK)
    refused(fsu(*again), f"generator {kept.id} of 'm' has these weights already")
    refused(fsu("generator", "import", "x", *again[3:]), "no model 'x'")
    assert len(service.ledger.generators.all()) == 1
    retired = fsu("generator", "retire", kept.id)
    assert retired.exit_code == 0, retired.output
    assert "the next request of m trains anew" in retired.stdout
    assert import_it(fsu, service).retired is None
    sound(service)


def test_the_generator_that_is_asked_for_serves_though_another_is_newer(
    fsu: Fsu, service: Service, submit: Any
) -> None:
    """The beginning of its id is enough; the request says which, to people and to programs."""
    first = import_it(fsu, service)
    import_it(fsu, service, "--set", "synthesize.seed=1")
    done = submit(8, "--generator", first.id[:-1])
    assert done.exit_code == 0, done.output
    (request,) = service.ledger.requests.all()
    assert request.generator == first.id
    shown = fsu("request", "show", request.id)
    assert f"generator {first.id} of m, and no other" in shown.stdout
    assert json.loads(fsu("request", "show", request.id, "--json").stdout)["generator"] == first.id
    ended = carry_out(service)
    assert ended.report is not None
    assert (ended.report["generator"]["use"], ended.report["generator"]["id"]) == ("reused", first.id)
    assert len(service.ledger.generators.all()) == 2
    assert '"generator_id":"' + first.id in service.ledger.audit.log(request=request.id)[0].detail
    sound(service)


def test_another_models_generator_is_transferred(fsu: Fsu, service: Service, submit: Any) -> None:
    """D' has this model's labels, its generator is one of this line, and later requests reuse it (table 5)."""
    source = import_it(fsu, service)
    submit(8, "--generator", source.id, model="n")
    done = carry_out(service)
    assert done.status is Status.SUCCEEDED, done.reason
    (own,) = service.ledger.generators.all("n")
    assert (own.origin, own.transferred_from, own.weights) == ("transferred", source.id, source.weights)
    assert (own.request, own.root) == (done.id, 1)
    dataset = Synthetic.from_bytes(service.artifacts.get(own.dataset))
    assert (dataset.predicted == (dataset.condition + 1) % 10).float().mean() > 0.95
    (erasure,) = service.ledger.models.erasures("n")
    assert (erasure.generator, erasure.generator_use) == (own.id, "transferred")
    submit(3, model="n")
    later = carry_out(service)
    assert later.report is not None
    assert (later.report["generator"]["use"], later.report["generator"]["id"]) == ("reused", own.id)
    events = [event for event in service.ledger.models.history("n") if event["event"] == "generator_transferred"]
    assert events[0]["detail"] == {"generator": own.id, "from": source.id}
    assert f"transferred from {source.id}" in fsu("generator", "show", own.id).stdout
    sound(service)


@pytest.mark.parametrize("model", ["m", "n"], ids=["reused", "transferred"])
def test_where_the_gate_refuses_it_no_other_is_trained(fsu: Fsu, service: Service, submit: Any, model: str) -> None:
    """The request ends as rejected, with the verdict; the registry is as it was."""
    source = import_it(fsu, service)
    submit(8, "--generator", source.id, *NONE_PASS, model=model)
    done = carry_out(service)
    assert done.status is Status.REJECTED
    assert (done.reason or "").startswith(f"generator_refused: the gate refuses {source.id} for this version: BN dist")
    assert done.report is not None
    assert done.report["generator"]["id"] == source.id
    assert done.report["generator"]["refused"][0].startswith("BN distance")
    assert service.ledger.generators.all() == [source]
    assert len(service.ledger.models.versions(model)) == 1
    sound(service)


@pytest.mark.parametrize("model", ["m", "n"], ids=["reused", "transferred"])
def test_a_refusal_is_not_forgotten_by_a_run_that_goes_on(fsu: Fsu, service: Service, submit: Any, model: str) -> None:
    """From whatever checkpoint there is."""
    source = import_it(fsu, service)
    submit(8, "--generator", source.id, *NONE_PASS, model=model)
    states: list[RunState] = []

    def twice(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
        unlearn(order, store, torch.device("cpu"), checkpoint=states.append)
        return unlearn(order, store, torch.device("cpu"), state=states[-1])

    assert (carry_out(service, twice).reason or "").startswith("generator_refused: ")
    assert states


def test_a_generator_that_is_gone_by_the_time_of_the_run(fsu: Fsu, service: Service, submit: Any) -> None:
    """The request is refused, with the reason, and no other one is trained."""
    source = import_it(fsu, service)
    for model in ("m", "n"):
        submit(8, "--generator", source.id, model=model)
    fsu("generator", "retire", source.id)
    for _ in range(2):
        done = carry_out(service, never)
        assert done.status is Status.REJECTED
        assert (done.reason or "").startswith(f"generator_unfit: generator {source.id} is retired (operator)")
    sound(service)


def test_a_generator_is_not_retired_under_a_run_that_asks_for_it(fsu: Fsu, service: Service, submit: Any) -> None:
    source = import_it(fsu, service)
    submit(8, "--generator", source.id, model="n")
    request = service.ledger.requests.claim("tester", 60)
    assert request is not None
    with pytest.raises(TransitionRefused, match=f"request {request.id} of 'n' is running"):
        service.ledger.generators.retire(source.id)
    service.ledger.requests.release(request, "stopped")
    service.ledger.generators.retire(source.id)


def test_generators_that_cannot_be_asked_for(fsu: Fsu, service: Service, submit: Any, trained: Any) -> None:
    """Unknown, retired, of another shape, sealed for another model: one line, nothing queued, no samples kept."""
    source = import_it(fsu, service)
    spec = trained.spec.model_copy(update={"height": 20, "width": 20})
    torch.manual_seed(0)
    service.models.register("big", spec, Classifier(spec).to_bytes())
    submit(8)
    carry_out(service)
    sealed = import_it(fsu, service, "--set", "synthesize.seed=1")
    assert fsu("generator", "seal", sealed.id).exit_code == 0
    before, asked = service.artifacts.digests().keys(), service.ledger.requests.all()
    refused(submit(3, "--generator", "g-none"), "no generator 'g-none'")
    refused(submit(3, "--generator", source.id, model="big"), "draws 10 classes of 1x16x16, 'big' takes 10 classes of")
    refused(submit(3, "--generator", sealed.id, model="n"), "is sealed, its weights are destroyed")
    refused(submit(3, "--generator", sealed.id), "its D' cannot serve this request")
    fsu("generator", "retire", source.id)
    refused(submit(3, "--generator", source.id), f"generator {source.id} is retired (operator)")
    assert (service.artifacts.digests().keys() - before, service.ledger.requests.all()) == (set(), asked)
    assert submit(3, "--generator", sealed.id, "--set", "synthesize.seed=1").exit_code == 0
    ended = carry_out(service)
    assert ended.report is not None
    assert ended.report["generator"]["id"] == sealed.id


def test_d_is_drawn_anew_for_another_recipe_and_weights_live_as_long_as_anybody_needs_them(
    fsu: Fsu, service: Service, submit: Any
) -> None:
    """Two generators of one line with the same weights: who is retired first takes only its own D' away."""
    source = import_it(fsu, service)
    submit(8, "--generator", source.id, "--set", "synthesize.per_class=30")
    assert carry_out(service).status is Status.SUCCEEDED
    own = service.ledger.generators.all("m")[-1]
    assert (own.transferred_from, own.weights) == (source.id, source.weights)
    assert len(Synthetic.from_bytes(service.artifacts.get(own.dataset))) == 300
    said = fsu("generator", "retire", source.id).stdout
    assert "but what another generator uses" in said
    assert service.artifacts.has(own.weights)
    assert not service.artifacts.has(source.dataset)
    sound(service)
    assert "but what" not in fsu("generator", "retire", own.id).stdout
    assert not service.artifacts.has(own.weights)
    sound(service)


def test_the_same_request_with_and_without_a_generator(fsu: Fsu, service: Service, submit: Any) -> None:
    """One that lives cannot be given another generator; a key stands for its generator too."""
    source = import_it(fsu, service)
    submit(8)
    (waiting,) = service.ledger.requests.all()
    refused(
        submit(8, "--generator", source.id), f"request {waiting.id} of 'm' asks for the same and is queued, without"
    )
    submit(3, "--generator", source.id, "--key", "k")
    assert "already queued" in submit(3, "--generator", source.id, "--key", "k").stdout
    refused(submit(3, "--key", "k"), "which asks for something else")
    assert len(service.ledger.requests.all()) == 2


def test_who_asks_for_a_generator_runs_alone(fsu: Fsu, service: Service, submit: Any) -> None:
    """Neither as the leader of a coalesced run nor as part of one."""
    source = import_it(fsu, service)
    for digit, more in ((8, ()), (3, ("--generator", source.id)), (5, ())):
        submit(digit, *more)
    claimed = service.ledger.requests.claim("tester", 60, max_batch=9)
    assert claimed is not None
    assert [other.behaviour.targets for other in service.ledger.requests.batch_members(claimed)] == [(5,)]
    for each in (claimed,):
        service.ledger.requests.cancel(each.id)
        service.ledger.requests.stop(each)
    led = service.ledger.requests.claim("tester", 60, max_batch=9)
    assert led is not None
    assert led.behaviour.targets == (3,)
    assert service.ledger.requests.batch_members(led) == []


def test_the_papers_form_draws_from_what_is_asked_for(fsu: Fsu, service: Service, submit: Any) -> None:
    """From its weights, labelled by the current version."""
    source = import_it(fsu, service)
    submit(8, "--generator", source.id, "--set", "form=paper")
    done = carry_out(service)
    assert done.report is not None
    assert done.report["generator"]["use"] == "transferred"
