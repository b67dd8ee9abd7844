"""`fsu model show`, `fsu model policy`, `fsu alias`, `fsu erased` and `fsu recheck`, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from fsu_ray.cli import app as commands
from fsu_ray.cli import lineage
from fsu_ray.cli.tree import plain_lines, version_tree
from fsu_ray.method.datasets import draw
from fsu_ray.method.inputs import save_samples
from fsu_ray.recipes import Recipe
from fsu_ray.records import AliasMove, Behaviour, Model, ModelSpec, ModelVersion, Policy
from fsu_ray.service import Service
from fsu_ray.work import Outcome, TargetResult
from tests.bench.lineage import fill

Fsu = Callable[..., Result]
SPEC = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def fsu(home: Path, monkeypatch: pytest.MonkeyPatch) -> Fsu:
    """Types a command in an empty folder."""
    monkeypatch.delenv("FSU_ACTOR", raising=False)

    def run(*words: str | int) -> Result:
        return CliRunner().invoke(commands, [str(word) for word in words])

    return run


@pytest.fixture
def erase(service: Service, trained: Any) -> Callable[..., None]:
    """The model `m`, and what commits the next version of it: with its weights, and threes for probes, unless `probes`
    are of another digit. Several targets are requests of one coalesced run."""
    service.models.register("m", trained.spec, trained.weights)

    def commit(*targets: int, probes: int = 3) -> None:
        for target in targets:
            behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
            service.ledger.requests.submit("m", behaviour, f"{target:064}", 8, Recipe())
        request = service.ledger.requests.claim("tester", 60, max_batch=len(targets) - 1)
        assert request is not None
        pixels = service.artifacts.put(save_samples(trained.train.pixels[draw(trained.train, [probes], 20, 0)]))
        report = {"forgetting": {"samples_in_target": 0.125, "probes_in_target": 0.01}}
        members = (request, *service.ledger.requests.batch_members(request))
        targets = tuple(TargetResult(member.id, "c" * 64, pixels, report) for member in members)
        weights = service.artifacts.put(trained.weights)
        made = ("a" * 64, "b" * 64, {"agreement": 0.99, "starved": []}, (), weights, targets, {})
        service.ledger.commit(request, Outcome(None, "trained", *made), service.ledger.models.version("m"))

    return commit


def refused(result: Result, words: str, code: int = 2) -> None:
    """One line that says `words`, an exit code, no traceback."""
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def version(number: int, parent: int | None, request: str | None = "r-1") -> ModelVersion:
    return ModelVersion(f"v-{number}", "m", number, parent, 1, "w" * 64, request, MOMENT)


def drawn(*parents: int | None, **aliases: int) -> list[str]:
    """The tree of versions 1, 2, ... with these parents: every line from its guides to the version's number."""
    versions = [version(number, parent) for number, parent in enumerate(parents, 1)]
    moves = {alias: AliasMove("m", alias, to, None, False, None, "ann", MOMENT) for alias, to in aliases.items()}
    tree = version_tree(Model("m-1", "m", SPEC, None, MOMENT), versions, {}, moves)
    screen = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with screen.capture() as capture:
        screen.print(tree)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert [line.rstrip() for line in plain_lines(tree)] == lines, "both ways of drawing agree"
    return [line.split("version ")[0] + line.split("version ")[1].split()[0] for line in lines[1:]]


class TestTree:
    def test_a_line_stands_flat(self) -> None:
        assert drawn(None, 1, 2, 3) == ["├── 1", "├── 2", "├── 3", "└── 4"]

    def test_a_branch_stands_below_its_version(self) -> None:
        """2 and 4 are children of 1; 4 leads to the newest version, 6, and so the line goes on with it."""
        assert drawn(None, 1, 2, 1, 4, 5) == ["├── 1", "│   ├── 2", "│   └── 3", "├── 4", "├── 5", "└── 6"]

    def test_the_line_goes_on_to_the_newest_version(self) -> None:
        assert drawn(None, 1, 1, 2) == ["├── 1", "│   └── 3", "├── 2", "└── 4"]

    def test_branches_of_branches(self) -> None:
        lines = drawn(None, 1, 2, 2, 1)
        assert lines == ["├── 1", "│   ├── 2", "│   │   └── 3", "│   └── 4", "└── 5"]

    def test_ten_thousand_versions_are_drawn_flat(self) -> None:
        versions = [version(number, number - 1 or None) for number in range(1, 10_001)]
        lines = list(plain_lines(version_tree(Model("m-1", "m", SPEC, None, MOMENT), versions, {}, {})))
        assert len(lines) == 10_001
        assert max(map(len, lines)) < 70

    def test_what_is_said_of_a_version(self) -> None:
        model = Model("m-1", "m", SPEC, None, MOMENT)
        versions = [version(1, None, None), version(2, 1), version(3, 2, None)]
        gone = [Behaviour(name="nine", kind="class", targets=(9,)), Behaviour(name="x", kind="subset", targets=(2, 3))]
        move = AliasMove("m", "a", 2, None, False, None, "ann", MOMENT)
        tree = version_tree(model, versions, {2: gone}, {"candidate": move, "prod": replace(move, version=2)})
        head, first, second, third = plain_lines(tree)
        assert head == "m: lenet5, 1x32x32, 10 classes, mean (0.0,), std (1.0,)"
        assert first.endswith("registered")
        assert "version 2  parent 1  2026-03-01" in second
        assert second.endswith("erased nine (class 9); x (subset 2 3)  <- candidate, prod")
        assert third.endswith("from outside")


def test_model_show(fsu: Fsu, service: Service, erase: Callable[..., None]) -> None:
    """A coalesced run is one version with several behaviours; the JSON document has all of it."""
    erase(8, 5)
    service.models.update("m", service.artifacts.get(service.ledger.models.version("m").weights))
    assert fsu("alias", "set", "m", "production", 2).exit_code == 0

    shown = fsu("model", "show", "m").stdout.splitlines()
    assert len(shown) == 4
    assert shown[2].endswith("erased class-8 (class 8); class-5 (class 5)  <- production")
    assert shown[3].endswith("from outside")
    document = json.loads(fsu("model", "show", "m", "--json").stdout)
    assert document.keys() == {"model", "versions", "erasures", "aliases", "policy"}
    assert [each["number"] for each in document["versions"]] == [1, 2, 3]
    assert [(each["version"], each["behaviour"]["targets"]) for each in document["erasures"]] == [(2, [8]), (2, [5])]
    assert document["erasures"][0]["report"]["forgetting"]["probes_in_target"] == 0.01
    assert document["aliases"]["production"]["version"] == 2
    assert document["policy"] == Policy().model_dump(mode="json")
    listed = json.loads(fsu("model", "list", "--json").stdout)
    assert [(m["latest"]["number"], [b["name"] for b in m["erased"]]) for m in listed] == [(3, ["class-8", "class-5"])]


class TestPolicy:
    def test_what_is_given_is_set_and_the_rest_stays(self, fsu: Fsu, service: Service) -> None:
        service.ledger.models.register("m", SPEC, "w" * 64)
        assert "samples_days    never" in fsu("model", "policy", "m").stdout
        assert service.ledger.models.history("m")[1:] == [], "to look is not to set"

        shown = fsu("model", "policy", "m", "--approval", "--samples-days", "30", "--by", "ann").stdout
        assert "approval        yes" in shown
        assert service.ledger.models.policy("m") == Policy(approval=True, samples_days=30)
        assert service.ledger.models.history("m")[-1]["detail"]["by"] == "ann"
        fsu("model", "policy", "m", "--generators", "max-age", "--generator-days", "7", "--seal", "root")
        aged = Policy(approval=True, samples_days=30, generators="max-age", generator_days=7, seal="root")
        assert service.ledger.models.policy("m") == aged
        fsu("model", "policy", "m", "--generators", "retire-after-erasure", "--samples-days", "never")
        assert service.ledger.models.policy("m") == Policy(
            approval=True, generators="retire-after-erasure", seal="root"
        )
        document = json.loads(fsu("model", "policy", "m", "--no-approval", "--json").stdout)
        assert Policy.model_validate(document) == Policy(generators="retire-after-erasure", seal="root")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--samples-days", "soon"], "--samples-days: "),
            (["--samples-days", "-1"], "--samples-days: "),
            (["--samples-days", "nan"], "--samples-days: "),
            (["--generators", "burn"], "--generators: "),
            (["--generators", "max-age"], "error: --generators: generator_days goes with generators = max-age"),
            (["--generator-days", "3"], "error: --generators: generator_days goes with generators = max-age"),
            (["--seal", "all"], "--seal: "),
            (["--approval", "--by", "ann@example.org"], "no opaque id"),
        ],
    )
    def test_what_is_no_policy(self, fsu: Fsu, service: Service, words: list[str], said: str) -> None:
        service.ledger.models.register("m", SPEC, "w" * 64)
        refused(fsu("model", "policy", "m", *words), said)
        assert service.ledger.models.policy("m") == Policy()


class TestAliases:
    def test_set_list_history(self, fsu: Fsu, service: Service, erase: Callable[..., None]) -> None:
        erase(8)
        assert "m has no aliases" in fsu("alias", "list", "m").stdout
        assert fsu("alias", "set", "m", "candidate", 1, "--force", "--reason", "T-1").exit_code == 0
        said = fsu("alias", "set", "m", "candidate", 2, "--by", "ann").stdout
        assert said == "m@candidate points to version 2, before to version 1\n"
        assert fsu("alias", "set", "m", "production", "candidate").stdout == "m@production points to version 2\n"

        moves = json.loads(fsu("alias", "history", "m", "--json").stdout)
        assert [(m["alias"], m["version"], m["forced"], m["actor"]) for m in moves] == [
            ("candidate", 1, True, "operator"),
            ("candidate", 2, False, "ann"),
            ("production", 2, False, "operator"),
        ]
        shown = fsu("alias", "history", "m").stdout
        assert "forced" in shown
        assert "T-1" in shown
        listed = json.loads(fsu("alias", "list", "m", "--json").stdout)
        assert {alias: move["version"] for alias, move in listed.items()} == {"candidate": 2, "production": 2}
        assert "candidate" in fsu("alias", "list", "m").stdout
        assert json.loads(fsu("alias", "set", "m", "candidate", 2, "--json").stdout)["previous"] == 2

    def test_what_is_refused(self, fsu: Fsu, erase: Callable[..., None]) -> None:
        erase(8)
        refused(fsu("alias", "set", "m", "production", 1), "still has 'class-8', erased as of version 2", code=1)
        refused(fsu("alias", "set", "m", "production", 1, "--force"), "needs a reason")
        refused(fsu("alias", "set", "m", "production", 1, "--force", "--reason", "two words"), "one word")
        refused(fsu("alias", "set", "m", "production", 3), "no version 3; its latest is 2")
        refused(fsu("alias", "set", "m", "production", "staging"), "no alias 'staging'; `fsu alias list m`")
        refused(fsu("alias", "set", "m", "7up", 2), "no name for an alias")
        refused(fsu("alias", "set", "m", "production", 2, "--by", "a b"), "no opaque id")
        refused(fsu("alias", "set", "x", "production", 2), "no model 'x'")
        for command in ("list", "history"):
            refused(fsu("alias", command, "x"), "no model 'x'")
        assert json.loads(fsu("alias", "history", "m", "--json").stdout) == []


class TestErased:
    def test_what_is_gone_as_of_a_version(self, fsu: Fsu, erase: Callable[..., None]) -> None:
        erase(8)
        erase(5)
        fsu("alias", "set", "m", "production", 2, "--force", "--reason", "T-1")
        fsu("recheck", "m")

        shown = fsu("erased", "m").stdout
        for words in ("m, version 3: 2 behaviours erased", "class-8", "12.50", "1.00", "passed on 3"):
            assert words in shown, words
        for reference in ("m@2", "m@production"):
            document = json.loads(fsu("erased", reference, "--json").stdout)
            assert (document["model"], document["version"]) == ("m", 2)
            (eight,) = document["erased"]
            assert (eight["behaviour"]["targets"], eight["version"], eight["samples_in_target"]) == ([8], 2, 0.125)
            assert (eight["recheck"]["version"], eight["recheck"]["passed"]) == (3, True)
        assert "version 1: 0 behaviours erased" in fsu("erased", "m@1").stdout

    def test_what_is_not_there_is_one_line(self, fsu: Fsu, erase: Callable[..., None]) -> None:
        for reference, words in (
            ("m@staging", "no alias"),
            ("m@2", "no version 2"),
            ("m@", "names no"),
            ("x", "no mod"),
        ):
            refused(fsu("erased", reference), words)
            refused(fsu("recheck", reference), words)

    def test_many_are_plain_lines_below_each_other(self, fsu: Fsu, service: Service) -> None:
        """`rich` takes too long for them; nothing is cut off and the columns stand in line."""
        fill(service.ledger, "line", lineage.FEW + 2)
        title, head, *lines = fsu("erased", "line").stdout.splitlines()
        assert title == f"line, version {lineage.FEW + 2}: {lineage.FEW + 1} behaviours erased"
        assert len(lines) == lineage.FEW + 1
        assert len({line.index("subset") for line in lines}) == 1
        assert head.index("kind") == lines[0].index("subset")
        assert all(each.request in line for each, line in zip(service.ledger.models.erased("line"), lines, strict=True))
        shown = fsu("model", "show", "line").stdout.splitlines()
        assert len(shown) == lineage.FEW + 3
        assert shown[-1].startswith("└── version 202")


class TestRecheck:
    def test_all_is_still_gone(self, fsu: Fsu, service: Service, erase: Callable[..., None]) -> None:
        erase(8)
        done = fsu("recheck", "m", "--by", "ann")
        assert done.exit_code == 0
        assert "passed" in done.stdout
        assert [each.actor for each in service.ledger.models.rechecks("m").values()] == ["ann"]
        assert "nothing is erased from m, version 1" in fsu("recheck", "m@1").stdout

    def test_what_has_come_back_is_exit_code_4(self, fsu: Fsu, service: Service, erase: Callable[..., None]) -> None:
        erase(8)
        erase(5, probes=5)
        done = fsu("recheck", "m")
        assert done.exit_code == 4
        assert "RETURNED" in done.stdout
        again = fsu("recheck", "m", "--json")
        assert again.exit_code == 4
        document = json.loads(again.stdout)
        assert (document["version"], document["passed"]) == (3, False)
        assert [(each["erasure"]["behaviour"]["name"], each["passed"]) for each in document["rechecks"]] == [
            ("class-8", True),
            ("class-5", False),
        ]
        assert "RETURNED on 3" in fsu("erased", "m").stdout
        told = [event["event"] for event in service.ledger.models.history("m")]
        assert told.count("recheck_failed") == 2

    def test_missing_probes_are_one_line(self, fsu: Fsu, service: Service, erase: Callable[..., None]) -> None:
        erase(8)
        service.artifacts.delete(service.ledger.models.erasures("m")[0].probes)
        refused(fsu("recheck", "m"), "is missing; check FSU_ARTIFACTS")


def test_every_command_has_help_and_an_example(fsu: Fsu) -> None:
    """`--help` everywhere, with an example at its end."""
    named = [["alias", name] for name in ("set", "list", "history")]
    for words in [*named, ["erased"], ["recheck"], ["model", "policy"], ["model", "show"]]:
        shown = fsu(*words, "--help")
        assert shown.exit_code == 0
        assert "Example: fsu" in shown.stdout
