"""fsu_ray/cluster/README.md: its commands exist, and its table has every file."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from fsu_ray.cli import app

FOLDER = Path(__file__).parents[2] / "fsu_ray" / "cluster"
README = (FOLDER / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("fsu ")])
def test_a_command_of_fsu_has_these_options(line: str) -> None:
    """Parsed as typed, without running it."""
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    assert command.make_context(command.name, words).params


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_a_module_that_is_run_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_every_file_of_the_folder_is_in_the_table() -> None:
    table = set(re.findall(r"`([a-z_]+\.\w+)`", README))
    assert {file.name for file in FOLDER.iterdir() if file.is_file()} - {"__init__.py", "README.md"} <= table
