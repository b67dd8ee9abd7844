"""The stored results: readable tables, an index of all of them, and neither in the wheel nor read at run time."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fsu_ray.experiments.catalogue import NAMES
from fsu_ray.experiments.markdown import NOTES, write_above_notes
from tests.bench.collect_results import RESULTS, collect

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "fsu_ray" / "experiments"
DOCUMENTS = [EXPERIMENTS / "README.md", ROOT / "tests" / "README.md", *sorted(RESULTS.rglob("*.md"))]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_table_cell_is_long(file: Path) -> None:
    """No cell has more than 120 characters, the targets of links not counted."""
    rows = [line for line in file.read_text().splitlines() if line.startswith("|")]
    cells = [re.sub(r"\]\([^)]*\)", "]", cell).strip() for row in rows for cell in row.split("|")]
    assert [cell for cell in cells if len(cell) > 120] == []


def test_the_index_lists_every_result() -> None:
    """Each file in results/ has one line in the README, and each link there leads to a file."""
    links = re.findall(r"^\| \[[^]]+\]\((results/[^)]+)\)", (EXPERIMENTS / "README.md").read_text(), re.M)
    files = [file.relative_to(EXPERIMENTS).as_posix() for file in RESULTS.rglob("*.md")]
    assert sorted(links) == sorted(files)
    assert {Path(link).stem for link in links} >= set(NAMES)


@pytest.mark.parametrize("file", sorted(RESULTS.rglob("*.md")), ids=lambda file: file.stem)
def test_links_of_results_lead_to_files(file: Path) -> None:
    """Links and pictures of the results exist."""
    targets = re.findall(r"\]\(([^)#]+)\)", file.read_text())
    assert [target for target in targets if not (file.parent / target).exists()] == []


def test_notes_survive_a_new_table(tmp_path: Path) -> None:
    """Collecting a table that was computed again replaces the table, and nothing below the marker line."""
    for scale in ("small", "paper"):
        (tmp_path / "new" / scale).mkdir(parents=True)
        write_above_notes(tmp_path / "new" / scale / "table1.md", f"# {scale}, new\n")
        (tmp_path / "new" / scale / "table1.parquet").touch()
    (tmp_path / "new" / "small" / "table1.a.png").write_bytes(b"picture")
    results = tmp_path / "results"
    results.mkdir()
    (results / "table1.md").write_text(f"# old\n\n{NOTES}\n\n## What failed\n\nMuch.\n")
    written = collect(tmp_path / "new", results, ["table1"])
    assert (results / "table1.md").read_text() == f"# small, new\n\n{NOTES}\n\n## What failed\n\nMuch.\n"
    assert (results / "paper" / "table1.md").read_text() == "# paper, new\n"
    assert [file.name for file in written] == ["table1.a.png", "table1.md", "table1.md"]
    write_above_notes(results / "table1.md", "# newer\n")
    assert "Much." in (results / "table1.md").read_text()


def test_no_experiment_reads_the_results() -> None:
    """No module names the folder, which an installed package does not have."""
    assert [file.name for file in EXPERIMENTS.glob("*.py") if re.search(r'"results["/]', file.read_text())] == []


def test_the_wheel_is_small(tmp_path: Path) -> None:
    """At most 600 kB; all modules and none of the results."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size <= 600_000
    names = zipfile.ZipFile(wheel).namelist()
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "fsu_ray").rglob("*.py")}
    assert modules <= set(names)
    assert [name for name in names if "/results/" in name] == []
    assert [name for name in names if name.endswith((".png", ".parquet"))] == []
