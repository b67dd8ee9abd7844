"""`fsu reproduce`: cells run side by side on Ray and are stored as they end; a second run computes missing cells."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fsu_ray.cluster import tasks
from fsu_ray.errors import NotFound, RunFailed, StorageError, UserError
from fsu_ray.experiments import catalogue, markdown, moons, reproduce
from fsu_ray.experiments.catalogue import Cell, CellContext, CellType, Row, Table, Work
from fsu_ray.experiments.reproduce import Reproduced, _file, _write

FSU = str(Path(sys.executable).parent / "fsu")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """No Ray: cells run in this process, one after another, and are listed. `seed` 7 breaks."""
    seen: list[Work] = []

    def side_by_side(function: Callable, more: Callable, resources: Callable, most: dict[str, float]) -> object:
        while waiting := list(more(1)):
            (item,) = waiting
            assert resources(item) == {"CPU": 1}
            seen.append(item[0])
            yield item, RunFailed("it broke") if item[0][1]["seed"] == 7 else function(item)

    monkeypatch.setattr(tasks, "side_by_side", side_by_side)
    monkeypatch.setattr(reproduce.workers, "connect", lambda cpus: None)
    monkeypatch.setattr(reproduce.workers, "resources", lambda: (False, {"CPU": 2}))
    return seen


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a number and its square, in context of Table 1; the square is a cell of its own, which leaves a blob."""

    def square(cell: Cell, context: CellContext) -> list[Row]:
        return [{"square": cell["seed"] ** 2, "weights": context.store.put(str(cell["seed"] ** 2).encode())}]

    def add(cell: Cell, context: CellContext) -> list[Row]:
        ((row,),) = context.needs
        assert context.store.get(row["weights"]) == str(row["square"]).encode()
        return [{"n": cell["seed"], "sum": cell["seed"] + row["square"]}]

    def report(rows: list[Row], folder: Path) -> str:
        (folder / "table1.png").write_bytes(b"a picture")
        return markdown.table(["n", "sum"], [[str(row["n"]), str(row["sum"])] for row in rows])

    table = Table(lambda scale, seeds: [("sum", {"seed": seed, "scale": scale}) for seed in range(seeds)], report)
    monkeypatch.setitem(moons.TABLES, "table1", table)
    monkeypatch.setitem(moons.CELL_TYPES, "square", CellType(square))
    monkeypatch.setitem(moons.CELL_TYPES, "sum", CellType(add, lambda cell: [("square", {"seed": cell["seed"]})]))
    for kind in ("square", "sum"):
        monkeypatch.setitem(catalogue.CELL_TYPES, kind, "moons")


@pytest.fixture
def table1(squares: None, here: list[Work], tmp_path: Path, store: Any) -> Callable[..., Reproduced]:
    """Reproduce it in a folder of the test's own."""
    return lambda scale="small", seeds=3, **more: reproduce.reproduce("table1", scale, seeds, tmp_path, store, **more)


Go = Callable[..., Reproduced]


def test_what_is_there_is_not_computed_again(here: list[Work], table1: Go, tmp_path: Path) -> None:
    """Three seeds, then five: the two new ones alone. Another scale is other work on the same squares; `again` computes
    the table's own cells, and not what they need."""
    done = table1()
    assert (done.cells, done.computed, [row["sum"] for row in done.rows]) == (6, 6, [0, 2, 6])
    assert [kind for kind, _ in here] == ["square"] * 3 + ["sum"] * 3
    here.clear()
    done = table1(seeds=5)
    assert (sorted((kind, cell["seed"]) for kind, cell in here), done.computed, len(done.rows)) == (
        [("square", 3), ("square", 4), ("sum", 3), ("sum", 4)], 4, 5,
    )  # fmt: skip
    assert [file.name for file in done.files] == ["table1.md", "table1.parquet", "table1.png"]
    assert done.files[0].parent == tmp_path / "small"
    assert [row["n"] for row in pq.read_table(done.files[1]).to_pylist()] == [0, 1, 2, 3, 4]
    assert table1("paper", 5).computed == 5
    assert table1(seeds=5).computed == 0
    assert table1(seeds=5, again=True).computed == 5


def test_cells_that_gain_by_a_gpu_share_it(
    squares: None, here: list[Work], table1: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four a GPU, each with its CPUs, and as many are handed to Ray as GPUs have room for; the others take a CPU."""
    taken: list[tuple[str, dict[str, float], dict[str, float]]] = []

    def side_by_side(function: Callable, more: Callable, resources: Callable, most: dict[str, float]) -> object:
        while waiting := list(more(1)):
            taken.append((waiting[0][0][0], resources(waiting[0]), most))
            yield waiting[0], function(waiting[0])

    monkeypatch.setattr(tasks, "side_by_side", side_by_side)
    monkeypatch.setattr(reproduce.workers, "resources", lambda: (True, {"GPU": 1, "CPU": 2}))
    table1(seeds=1)
    assert {most["CPU"] for *_, most in taken} == {1}, "none of these does"
    del taken[:]
    monkeypatch.setitem(moons.CELL_TYPES, "sum", dataclasses.replace(moons.CELL_TYPES["sum"], gpu=True))
    monkeypatch.setattr("ray.get_gpu_ids", list)
    table1("paper", seeds=2, per_gpu=4)
    shared = {"GPU": 0.25, "CPU": 2}
    assert [each for each in taken if each[0] == "sum"] == [("sum", shared, shared)] * 2
    assert [each for each in taken if each[0] == "square"] == [("square", {"CPU": 1}, shared)]


def test_what_has_left_the_store_is_made_again_where_it_is_needed(here: list[Work], table1: Go, store: Any) -> None:
    """A new scale needs the squares, of which one has lost its blob; what nobody needs stays lost."""
    table1()
    here.clear()
    store.clear()
    assert table1().computed == 0
    assert table1("paper", 2).computed == 4
    assert sorted(kind for kind, _ in here) == ["square", "square", "sum", "sum"]
    here.clear()
    assert table1("paper", 3, again=True).computed == 4
    assert sorted((kind, cell["seed"]) for kind, cell in here) == [("square", 2), ("sum", 0), ("sum", 1), ("sum", 2)]


def test_what_others_wait_for_goes_first(squares: None, tmp_path: Path, store: Any) -> None:
    """Whichever of the cells is named first."""
    alone, sums = ("square", {"seed": 1}), ("sum", {"seed": 2})
    for wanted in ([alone, sums], [sums, alone]):
        assert reproduce._find_missing(tmp_path, wanted, store).ready() == [("square", {"seed": 2}), alone]


def test_a_cell_that_breaks_costs_no_other(here: list[Work], table1: Go, tmp_path: Path) -> None:
    """After the eighth square broke, the ninth and its sum are still computed; no report is written."""
    with pytest.raises(RunFailed, match=r"1 of 18 cells of table1 broke: square: seed 7: it"):
        table1(seeds=9)
    assert len(list((tmp_path / "cells").glob("sum-*.parquet"))) == 8
    assert not (tmp_path / "small" / "table1.md").exists()
    here.clear()
    with pytest.raises(RunFailed, match="the same command computes the missing cells"):
        table1(seeds=9)
    assert here == [("square", {"seed": 7})]


def test_a_file_that_was_cut_short_is_computed_again(table1: Go, tmp_path: Path) -> None:
    """As a power cut leaves one."""
    table1()
    file = sorted((tmp_path / "cells").glob("sum-*"))[0]
    file.write_bytes(file.read_bytes()[:100])
    done = table1()
    assert (done.computed, len(done.rows)) == (1, 3)


def test_the_report_says_where_it_is_from(table1: Go, tmp_path: Path) -> None:
    """Command, date, machine and code, in the report and in every row; rows of two codes are called that."""
    done = table1(seeds=1)
    (row,) = done.rows
    head = done.markdown.splitlines()[2]
    assert head.startswith("`fsu reproduce table1 --scale small --seeds 1`. Computed 20")
    for column in ("date", "machine", "code"):
        assert row[column]
        assert row[column] in head
    (file,) = (tmp_path / "cells").glob("sum-*")
    reproduce._write(file, [{**row, "code": "z-older"}])
    assert f"code {row['code']} and z-older." in table1(seeds=2).markdown


def test_names_and_folders_that_are_none(
    table1: Go, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what to do."""
    with pytest.raises(NotFound, match="`fsu reproduce list`"):
        reproduce.reproduce("table99", "small", 1, tmp_path, store)
    with pytest.raises(NotFound, match=r"take table5a, table5b$"):
        reproduce.reproduce("table5", "small", 1, tmp_path, store)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="matplotlib: pip install"):
            table1()
    (tmp_path / "cells").touch()
    with pytest.raises(StorageError, match="--into"):
        table1()


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_every_name_leads_to_cells_that_can_be_told_apart(name: str) -> None:
    """At both scales; what they need is known too. Fewer seeds are a part of more, but for a single picture."""
    for scale in ("small", "paper"):
        cells = catalogue.find(name).cells(scale, 2)
        assert cells
        waiting = list(cells)
        while waiting:
            work = waiting.pop()
            assert json.loads(json.dumps(work)) == list(work)
            waiting += catalogue.find_cell_type(work[0]).needs(work[1])
        assert len({reproduce._key(work) for work in cells}) == len(cells)


def test_means_and_deviations() -> None:
    """As the paper prints them: of the sample, and without one where there is one value."""
    assert markdown.spread([1, 2, 3]) == "2.00 ± 1.00"
    assert markdown.spread([98.414], 1) == "98.4"
    assert markdown.spread([]) == "-"
    assert markdown.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_the_command_refuses_in_one_line() -> None:
    """A name and a scale that are none, no seeds."""
    for words in (["tabel1"], ["table1", "--scale", "huge"], ["table1", "--seeds", "0"]):
        done = subprocess.run([FSU, "reproduce", *words], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")


def test_the_job_is_the_command() -> None:
    """`python -m jobs.reproduce`, as a Ray job has it: one JSON document, and the same exit code."""
    root = Path(__file__).parent.parent.parent
    words = [sys.executable, "-m", "jobs.reproduce"]
    done = subprocess.run([*words, "list"], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert {each["name"]: each["what"] for each in json.loads(done.stdout)} == {
        name: what for name, (_, what) in catalogue.NAMES.items()
    }
    done = subprocess.run([*words, "table99"], cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_what_is_printed_as_json_leaves_out_pictures(home: Path) -> None:
    """A row's picture or map is in the Parquet file alone, which has all of it."""
    cells = home / ".fsu" / "reproduce" / "cells"
    cells.mkdir(parents=True)
    for work in catalogue.find("figure6").cells("small", 1):
        row = {"piece": work[0], "seed": 0, "arch": "preactresnet18:16", "date": "2026", "machine": "m", "code": "c",
               "D_r": 1.0, "D_e": 2.0, "epochs": 1, "full_D_r": 1.0, "full_D_e": 2.0, "alpha": 1.0, "refused": "",
               "png": b"\x89PNG", "map": [1.0, 2.0], **{key: value for key, value in work[1].items() if key in
               ("how", "rho", "method", "variant")}}  # fmt: skip
        _write(_file(cells, work), [row])
    done = subprocess.run([FSU, "reproduce", "figure6", "--seeds", "1", "--json"], capture_output=True, text=True,
                          timeout=100, check=True)  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["computed"] == 0
    assert {row["D_e"] for row in answer["rows"]} == {2.0}
    assert not {"png", "map"} & set().union(*answer["rows"])
    assert (home / ".fsu" / "reproduce" / "small" / "figure6.png").read_bytes() == b"\x89PNG"


@pytest.mark.slow
def test_code_without_a_checkout(tmp_path: Path) -> None:
    """As a Ray job has it: a version and a digest of the modules, the same for the same and another for others."""
    here, answers = Path(reproduce.__file__).parent.parent, []
    for name, more in (("a", ""), ("b", ""), ("c", "# changed")):
        shutil.copytree(here, tmp_path / name / "fsu_ray", ignore=shutil.ignore_patterns("__pycache__", "results"))
        with (tmp_path / name / "fsu_ray" / "errors.py").open("a") as file:
            file.write(more)
        words = [sys.executable, "-c", "from fsu_ray.experiments.reproduce import code; print(code())"]
        done = subprocess.run(words, cwd=tmp_path / name, capture_output=True, text=True, timeout=100, check=True)
        answers.append(done.stdout.strip())
    assert re.fullmatch(r"[0-9.]+, sources [0-9a-f]{10}", answers[0])
    assert answers[0] == answers[1] != answers[2]


def slow_square(number: int) -> int:
    """In a Ray task."""
    if number == 3:
        raise NotFound("no 3")
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(5 if number == 50 else 0.1)
    return number**2


@pytest.mark.ray
def test_tasks_side_by_side_and_what_comes_of_each() -> None:
    """On a Ray with room for two: all results, an error of ours for what raised and for a process that died. What can
    begin only then does so at once, whatever else is running or could: little is handed over before there is room."""
    results: dict[int, object] = {}
    ready, started = [50, 0, 10, 11, 12, 13], []

    def more(room: int) -> list[int]:
        if list(results) == [0]:
            ready[:0] = [1, 2, 3, 5, 4]
        now, ready[:] = ready[:room], ready[room:]
        started.extend(now)
        assert len(started) - len(results) <= 3
        return now

    each: dict[str, float] = {"CPU": 2}
    reproduce.workers.connect(4)
    try:
        for number, result in tasks.side_by_side(slow_square, more, lambda number: each, each):
            results[number] = result
    finally:
        reproduce.workers.disconnect()
    assert list(results).index(1) < list(results).index(50), "what can begin did not wait for the slow one"
    assert started[:4] == [50, 0, 10, 1]
    assert {number: results[number] for number in (0, 1, 2, 5, 13)} == {0: 0, 1: 1, 2: 4, 5: 25, 13: 169}
    assert isinstance(results[3], RunFailed)
    assert "no 3" in str(results[3])
    assert isinstance(results[4], RunFailed)


@pytest.mark.ray
def test_table1_is_interrupted_and_goes_on(home: Path) -> None:
    """The real command on Ray, interrupted when one of its two cells has ended: that one is kept, the second run
    computes the other, and the table says what the paper says."""
    words = [FSU, "reproduce", "table1", "--seeds", "1", "--cpus", "2"]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stderr
    assert first.stderr.readline().startswith("1 of 2: moons-")
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert "what has ended is kept" in errors
    assert len(list(home.glob(".fsu/reproduce/cells/*.parquet"))) == 1
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=400, check=True)
    answer = json.loads(done.stdout)
    assert (answer["cells"], answer["computed"]) == (2, 1)
    assert [Path(file).name for file in answer["files"]] == ["table1.md", "table1.parquet"]
    by_method: dict[str, list[float]] = {}
    for row in answer["rows"]:
        by_method.setdefault(row["method"], []).append(row["De_oracle"])
    assert sum(by_method["Ours"]) / 5 < 0.05 < 0.2 < sum(by_method["Ours, nothing filtered"]) / 5
    assert all(
        0.25 < by_method[f"{method} {cut}"][0] < 0.45 for method in ("EUBO", "RKL") for cut in ("1e-05", "1e-09", "0")
    )
