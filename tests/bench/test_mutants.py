"""The mutation tester: which changes it makes of a small module, and that a seed draws the same ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOY = '''
"""A module."""
LIMIT = 3
def gate(x: int = 1, *, strict: bool = False) -> str | None:
    """Whether x passes."""
    if x < LIMIT and not strict:
        raise ValueError("less than 3")
    log.warning("never changed")
    seen["x"] = x
    note(x)
    return "passed" if x + 1 else None
'''


@pytest.fixture(scope="module")
def tester() -> ModuleType:
    """tests/bench/mutants.py as a module."""
    file = Path(__file__).with_name("mutants.py")
    spec = importlib.util.spec_from_file_location("mutants", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_each_mutant_is_one_change(tester: ModuleType) -> None:
    """Comparisons, constants, conditions, statements and results; no docstring, annotation, message or log."""
    told = [(mutant.where, mutant.before, mutant.after) for mutant in tester.mutants(TOY)]
    assert told == [
        ("(module)", "3", "4"),
        ("(module)", "3", "2"),
        ("gate", "False", "True"),
        ("gate", "1", "2"),
        ("gate", "1", "0"),
        ("gate", "if x < LIMIT and (not strict):", "if not (x < LIMIT and (not strict)):"),
        ("gate", "x < LIMIT and (not strict)", "x < LIMIT or not strict"),
        ("gate", "x < LIMIT", "x <= LIMIT"),
        ("gate", "x < LIMIT", "x >= LIMIT"),
        ("gate", "not strict", "strict"),
        ("gate", "seen['x'] = x", "pass"),
        ("gate", "'x'", "'x_'"),
        ("gate", "note(x)", "pass"),
        ("gate", "return 'passed' if x + 1 else None", "return None"),
        ("gate", "'passed' if x + 1 else None", "'passed' if not x + 1 else None"),
        ("gate", "x + 1", "x - 1"),
        ("gate", "1", "2"),
        ("gate", "1", "0"),
    ]


def test_only_keywords_with_a_default_are_left_out(tester: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def ours(a, b=1, *, c, d=2): ...")
    names = tester.read_names(tmp_path)
    told = [mutant.after for mutant in tester.mutants("ours(a=x, b=x, c=x, d=x)\ntheirs(e=x)", names)]
    assert told == ["pass", "ours()", "ours()", "pass", "theirs()"]


def test_conditions_of_comprehensions_are_dropped_and_turned_round(tester: ModuleType) -> None:
    told = [mutant.after for mutant in tester.mutants("y = [x for x in z if x.good]")]
    assert told == ["[x for x in z]", "[x for x in z if not x.good]"]


def test_a_seed_draws_the_same_mutants_though_others_come(tester: ModuleType) -> None:
    """Another seed draws others; a new function leaves those that stay in the sample as they are."""
    few, more = tester.mutants(TOY), tester.mutants(TOY + "\ndef new(y):\n    return y * 2\n")

    def ids(candidates: list[object], seed: int = 0, number: int = 8) -> list[str]:
        return [digest for digest, _ in tester.sample(candidates, number, seed)]

    assert ids(few) == ids(few)
    assert len(ids(few)) == 8
    assert ids(few) != ids(few, seed=1)
    everything = [digest for digest, mutant in tester.sample(more, 99, 0) if mutant.where != "new"]
    assert sorted(everything) == sorted(ids(few, number=99))


@pytest.mark.slow
def test_a_test_run_is_killed_survived_or_timed_out(
    tester: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how its process ends."""
    endings = {"killed": "os._exit(1)", "survived": "os._exit(0)", "timeout": "time.sleep(60)"}
    for outcome, ending in endings.items():
        code = f"import os, time; os.setpgid(0, 0); {ending}"
        monkeypatch.setattr(tester, "_test_and_exit", lambda *_, code=code: exec(code))
        assert tester.run_tests(tmp_path, (), 2.0).outcome == outcome


def test_reasons_are_read_by_module_and_id(tester: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "reasons.txt"
    file.write_text("# a comment\n\ngate 0123abcd | f | x | y | a -> b | the same\n")
    assert tester.read_equivalent(file) == {"gate 0123abcd": "the same"}
    assert tester.read_equivalent(tmp_path / "none.txt") == {}


def test_every_target_is_there(tester: ModuleType) -> None:
    """The modules, their tests, and a reason for each mutant of a module that is tested."""
    for target in tester.TARGETS.values():
        assert (tester.ROOT / "fsu_ray" / target.path).is_file()
        assert all((tester.ROOT / test).is_file() for test in target.tests)
        assert target.tests
    assert {entry.split()[0] for entry in tester.read_equivalent()} <= set(tester.TARGETS)
