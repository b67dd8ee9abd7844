"""`fsu recipe`, and which recipe a request takes: a search's, a preset's, with fsu.toml and --set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fsu_ray.cli import app as commands
from fsu_ray.config import read_settings
from fsu_ray.method.datasets import write_samples
from fsu_ray.recipes import Recipe, RelearnRecipe, SynthesizeRecipe
from fsu_ray.records import ModelSpec, SearchedRecipe
from fsu_ray.service import Service, connect
from fsu_ray.work import Outcome, TargetResult

Fsu = Callable[..., Result]
SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
FOUND = Recipe(synthesize=SynthesizeRecipe(entropy_threshold=0.9), relearn=RelearnRecipe(epochs=7))
EVIDENCE = {"trials": 24, "default": {"score": 0.91}}


@pytest.fixture
def fsu(service: Service, home: Path, monkeypatch: pytest.MonkeyPatch) -> Fsu:
    """Types a command in a folder with the model `m` and the samples s/."""
    monkeypatch.delenv("FSU_ACTOR", raising=False)
    service.ledger.models.register("m", SPEC, "w" * 64)
    write_samples(torch.zeros((6, *SPEC.shape), dtype=torch.uint8), home / "s")

    def run(*words: str | int) -> Result:
        return CliRunner().invoke(commands, [str(word) for word in words])

    return run


@pytest.fixture
def searched(fsu: Fsu, service: Service) -> SearchedRecipe:
    """What a search has found for class requests of `m`."""
    return service.ledger.recipes.keep("m", "class", FOUND, 0.97, EVIDENCE, "u-1")


def submit(fsu: Fsu, target: int, *more: str) -> Result:
    name = f"class-{target}"
    done = fsu("request", "submit", "--model", "m", "--behaviour", name, "--target", target, "--samples", "s", *more)
    assert done.exit_code == 0, done.output
    return done


def refused(result: Result, words: str, code: int = 2) -> None:
    """One line that says `words`, no traceback."""
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


class TestSubmit:
    def test_without_a_search_it_is_the_default(self, fsu: Fsu, service: Service) -> None:
        assert "recipe: default\n" in submit(fsu, 8).stdout
        assert "recipe: default, changed by --set\n" in submit(fsu, 4, "--set", "relearn.epochs=2").stdout
        assert "recipe: digits\n" in submit(fsu, 3, "--recipe", "digits").stdout
        made = [request.recipe for request in service.ledger.requests.all()]
        assert made == [Recipe(), Recipe(relearn=RelearnRecipe(epochs=2)), service.recipes.preset("digits")]

    def test_what_was_found_is_taken(self, fsu: Fsu, service: Service, searched: SearchedRecipe) -> None:
        assert f"recipe: searched {searched.id}, score 0.97\n" in submit(fsu, 8).stdout
        (request,) = service.ledger.requests.all()
        assert request.recipe == FOUND
        assert service.ledger.recipes.origin(request) == searched

    def test_a_preset_that_is_named_overrides_it(self, fsu: Fsu, service: Service, searched: SearchedRecipe) -> None:
        assert "recipe: default\n" in submit(fsu, 8, "--recipe", "default").stdout
        assert service.ledger.requests.all()[0].recipe == Recipe()

    def test_it_is_for_its_kind_alone(self, fsu: Fsu, service: Service, searched: SearchedRecipe) -> None:
        assert "recipe: default\n" in submit(fsu, 8, "--kind", "subset").stdout
        assert service.ledger.requests.all()[0].recipe == Recipe()

    def test_changes_lie_on_top_and_are_of_no_search(
        self, fsu: Fsu, service: Service, searched: SearchedRecipe
    ) -> None:
        said = submit(fsu, 8, "--set", "relearn.epochs=2", "--set", "invert.weights.bn=3").stdout
        assert f"recipe: searched {searched.id}, score 0.97, changed by --set\n" in said
        (request,) = service.ledger.requests.all()
        recipe = request.recipe
        assert (recipe.relearn.epochs, recipe.invert.weights.bn, recipe.synthesize.entropy_threshold) == (2, 3, 0.9)
        assert service.ledger.recipes.origin(request) is None
        refused(fsu("request", "submit", "--model", "m", "--behaviour", "x", "--target", 3, "--samples", "s",
                    "--set", "invert.stepz=3"), "invert.stepz")  # fmt: skip

    def test_a_reset_takes_it_away(self, fsu: Fsu, service: Service, searched: SearchedRecipe) -> None:
        submit(fsu, 8)
        said = fsu("recipe", "reset", "m", "--kind", "class", "--by", "u-2").stdout
        assert said == "class requests of m take the preset default again; those that are queued keep their recipe\n"
        assert "recipe: default\n" in submit(fsu, 4).stdout
        assert [request.recipe for request in service.ledger.requests.all()] == [FOUND, Recipe()]

    def test_the_same_again_keeps_its_recipe(self, fsu: Fsu, service: Service) -> None:
        """A search in between makes no other request of it, with a key or without; and nothing is said of a recipe
        that was not taken."""
        submit(fsu, 8, "--key", "t-1")
        submit(fsu, 4)
        service.ledger.recipes.keep("m", "class", FOUND, 0.97, EVIDENCE)
        for again in (submit(fsu, 8, "--key", "t-1"), submit(fsu, 4)):
            assert again.stdout.startswith("the same request is already queued")
        assert json.loads(submit(fsu, 4, "--json").stdout)["recipe_from"] is None
        assert [request.recipe for request in service.ledger.requests.all()] == [Recipe(), Recipe()]

    def test_as_json(self, fsu: Fsu, searched: SearchedRecipe) -> None:
        taken = [
            json.loads(submit(fsu, target, *more, "--json").stdout)["recipe_from"]
            for target, more in ((8, []), (4, ["--set", "relearn.epochs=2"]), (3, ["--recipe", "digits"]))
        ]
        assert taken == [
            {"search": searched.id, "preset": None, "changed": False},
            {"search": searched.id, "preset": None, "changed": True},
            {"search": None, "preset": "digits", "changed": False},
        ]


class TestSettings:
    TOML = "[recipe.relearn]\nepochs = 9\n[recipe.gate]\nagreement_min = 0.99\n"

    def test_the_file_lies_on_presets_and_not_on_what_was_found(
        self, fsu: Fsu, service: Service, home: Path, searched: SearchedRecipe
    ) -> None:
        """What it says is passed over, and the command says so; a value that is the same is no matter."""
        (home / "fsu.toml").write_text(self.TOML)
        done = submit(fsu, 8)
        assert done.stderr == (
            "note: [recipe] of fsu.toml is for presets, this recipe has its own relearn.epochs, gate.agreement_min; "
            "--set changes it\n"
        )
        assert submit(fsu, 3, "--set", "relearn.epochs=9", "--set", "gate.agreement_min=0.99").stderr == ""
        assert submit(fsu, 4, "--recipe", "default").stderr == ""
        made = [request.recipe for request in service.ledger.requests.all()]
        assert made[0] == FOUND
        assert [(recipe.relearn.epochs, recipe.gate.agreement_min) for recipe in made[1:]] == [(9, 0.99), (9, 0.99)]
        (home / "fsu.toml").write_text("[recipe.relearn]\nepochs = 7\n")
        assert submit(fsu, 5).stderr == ""

    def test_the_app_chooses_as_the_command_does(
        self, service: Service, home: Path, fsu: Fsu, searched: SearchedRecipe
    ) -> None:
        (home / "fsu.toml").write_text(self.TOML)
        opened = connect(read_settings())
        found = opened.recipes.resolve("m", "class")
        assert (found.recipe, found.search, found.preset, found.named) == (FOUND, searched, None, False)
        assert opened.recipes.resolve("m", "class", "default").recipe == opened.recipes.preset()
        assert opened.recipes.resolve("m", "class", "default").named
        assert opened.recipes.resolve("m", "subset").recipe == opened.recipes.preset()
        assert opened.recipes.resolve("m", "subset", changes=({"relearn": {"epochs": 2}},)).named


class TestRecipe:
    def test_list(self, fsu: Fsu, searched: SearchedRecipe) -> None:
        fsu("recipe", "reset", "m", "--kind", "class", "--by", "u-2")
        shown = fsu("recipe", "list", "m").stdout
        for words in (searched.id, "class requests", "0.97", FOUND.digest[:12], "u-1", "reset to a preset", "u-2"):
            assert words in shown, words
        assert "in force" not in shown
        first, second = json.loads(fsu("recipe", "list", "m", "--json").stdout)
        assert (first["id"], first["score"], first["evidence"]) == (searched.id, 0.97, EVIDENCE)
        assert (first["digest"], first["in_force"]) == (FOUND.digest, False)
        assert Recipe.model_validate(first["recipe"]) == FOUND
        assert (second["recipe"], second["digest"], second["in_force"]) == (None, None, False)

    def test_one_that_is_in_force_says_so(self, fsu: Fsu, service: Service, searched: SearchedRecipe) -> None:
        service.ledger.recipes.keep("m", "class", Recipe(), 0.98, {})
        service.ledger.recipes.keep("m", "subset", FOUND, 0.8, {})
        lines = [line for line in fsu("recipe", "list", "m").stdout.splitlines() if "s-" in line]
        assert ["in force" in line for line in lines] == [False, True, True]
        listed = json.loads(fsu("recipe", "list", "m", "--json").stdout)
        assert [each["in_force"] for each in listed] == [False, True, True]

    def test_show(self, fsu: Fsu, searched: SearchedRecipe) -> None:
        """What is not as in the preset, and the evidence."""
        shown = fsu("recipe", "show", "m").stdout
        assert f"class requests of m: searched {searched.id}, score 0.97\n" in shown
        assert "  synthesize.entropy_threshold 0.9\n  relearn.epochs 7\n" in shown
        assert '"trials": 24' in shown
        assert "subset requests of m: default\n" in shown
        assert "subset" not in fsu("recipe", "show", "m", "--kind", "class").stdout
        document = json.loads(fsu("recipe", "show", "m", "--json").stdout)
        assert document.keys() == {"class", "subset"}
        found, preset = document["class"], document["subset"]
        assert (found["preset"], found["digest"], found["search"]["evidence"]) == (None, FOUND.digest, EVIDENCE)
        assert (preset["preset"], preset["digest"], preset["search"]) == ("default", Recipe().digest, None)
        assert Recipe.model_validate(found["recipe"]) == FOUND

    def test_reset_as_json(self, fsu: Fsu, searched: SearchedRecipe) -> None:
        document = json.loads(fsu("recipe", "reset", "m", "--kind", "class", "--by", "u-2", "--json").stdout)
        assert (document["kind"], document["recipe"], document["actor"]) == ("class", None, "u-2")
        assert document["in_force"] is False

    def test_what_cannot_be_is_one_line(self, fsu: Fsu, service: Service) -> None:
        assert "no search has found a recipe for m; `fsu search` does" in fsu("recipe", "list", "m").stdout
        for words in (["list", "x"], ["show", "x"], ["reset", "x", "--kind", "class"]):
            refused(fsu("recipe", *words), "no model 'x'")
        for words in (["show", "m", "--kind", "all"], ["reset", "m", "--kind", "all"]):
            refused(fsu("recipe", *words), "no kind 'all' of requests: use class or subset")
        refused(fsu("recipe", "reset", "m", "--kind", "class"), "have no searched recipe to reset")
        service.ledger.recipes.keep("m", "class", FOUND, 0.9, {})
        refused(fsu("recipe", "reset", "m", "--kind", "class", "--by", "a b"), "no opaque id")
        assert len(service.ledger.recipes.all("m")) == 1


class TestOrigin:
    @pytest.fixture
    def erased(self, fsu: Fsu, service: Service, searched: SearchedRecipe) -> list[str]:
        """Two requests that have ended, of a preset and of a search."""
        submit(fsu, 4, "--recipe", "default")
        submit(fsu, 8)
        ended = []
        for _ in range(2):
            request = service.ledger.requests.claim("tester", 60)
            assert request is not None
            report = {"forgetting": {"samples_in_target": 0.0, "probes_in_target": 0.0}}
            target = TargetResult(request.id, "c" * 64, "e" * 64, report)
            made = ("a" * 64, "b" * 64, {}, (), "d" * 64, (target,), {})
            service.ledger.commit(request, Outcome(None, "trained", *made), service.ledger.models.version("m"))
            ended.append(request.id)
        return ended

    def test_erased_shows_it(self, fsu: Fsu, searched: SearchedRecipe, erased: list[str]) -> None:
        head, *lines = [line for line in fsu("erased", "m").stdout.splitlines() if "request" in line or "r-" in line]
        assert "recipe of" in head
        assert [searched.id in line for line in lines] == [False, True]
        assert all(request in line for request, line in zip(erased, lines, strict=True)), "nothing is broken up"
        document = json.loads(fsu("erased", "m", "--json").stdout)
        assert [each["recipe_origin"] for each in document["erased"]] == [None, searched.id]
        assert "recipe of" not in fsu("erased", "m@2").stdout, "no column without one"

    def test_request_show_shows_it(self, fsu: Fsu, searched: SearchedRecipe, erased: list[str]) -> None:
        first, second = (fsu("request", "show", request).stdout for request in erased)
        assert f"recipe {Recipe().digest[:12]}: not of a search\n" in first
        assert f"recipe {FOUND.digest[:12]}: searched {searched.id}, score 0.97\n" in second
        document = json.loads(fsu("request", "show", erased[1], "--json").stdout)
        assert (document["recipe_origin"], document["recipe_digest"]) == (searched.id, FOUND.digest)
        assert document["report"]["recipe"] == {"digest": FOUND.digest, "origin": searched.id}
        assert json.loads(fsu("request", "show", erased[0], "--json").stdout)["recipe_origin"] is None
        submit(fsu, 3)
        waiting = json.loads(fsu("request", "list", "--status", "queued", "--json").stdout)[0]["id"]
        assert f"searched {searched.id}" in fsu("request", "show", waiting).stdout, "before it has a report"

    def test_history_and_the_audit_show_it(self, fsu: Fsu, searched: SearchedRecipe, erased: list[str]) -> None:
        fsu("recipe", "reset", "m", "--kind", "class")
        shown = fsu("history", "m").stdout
        for words in ("recipe_found", f"search {searched.id}, kind class, score 0.97", "recipe_reset",
                      f"recipe_origin {searched.id}"):  # fmt: skip
            assert words in shown, words
        events = json.loads(fsu("history", "m", "--json").stdout)
        origins = [event["detail"].get("recipe_origin") for event in events if event["event"] == "erased"]
        assert origins == [None, searched.id]
        logged = fsu("audit", "log", "--model", "m").stdout
        assert f"recipe of search {searched.id} for class requests, score 0.97" in logged
        assert "class requests take a preset again" in logged
        assert fsu("audit", "verify", "--no-artifacts").exit_code == 0
