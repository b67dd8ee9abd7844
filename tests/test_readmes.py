"""The READMEs are true: their commands parse, their links lead somewhere, their Python runs, and they stay short."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fsu_ray.cli import app

ROOT = Path(__file__).parent.parent
FILES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*README.md"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
)
COMMANDS = typer.main.get_command(app)


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def shell_lines(text: str) -> Iterator[str]:
    """The commands of every block marked `sh`, each on one line and without comments."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in re.split(r"&&|;|\|(?!\|)", line.partition(" #")[0]))


def fsu_words(command: str) -> list[str] | None:
    """The words after `fsu` in a command; None where it is another program's."""
    words = shlex.split(re.split(r"\s[<>&]", command)[0])
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words[1:] if words and Path(words[0]).name == "fsu" else None


def parse(words: list[str]) -> None:
    """Parse the words of an `fsu` command as the command line does; raises what it raises for words that do not fit."""
    command, context = COMMANDS, typer.Context(COMMANDS, info_name="fsu")
    if words and words[0].startswith("--"):  # of `fsu` itself: parsing --install-completion would install it
        assert any(words[0] in option.opts for option in COMMANDS.params), words[0]
        return
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    command.make_context("fsu", list(words), parent=context)


TYPED = [(relative(file), line) for file in FILES for line in shell_lines(file.read_text()) if fsu_words(line)]


def test_there_are_commands_to_check() -> None:
    assert len(TYPED) > 30
    assert {"README.md", "fsu_ray/cli/README.md", "fsu_ray/cluster/README.md"} <= {file for file, _ in TYPED}


@pytest.mark.parametrize(("file", "line"), TYPED)
def test_every_command_has_the_options_that_a_readme_types(file: str, line: str) -> None:
    """Commands and options exist, arguments are complete and of the right type."""
    parse(fsu_words(line) or [])


def test_a_command_with_an_unknown_option_is_noticed() -> None:
    for words in (["request", "submit", "--no-such-option"], ["history"], ["run", "--max", "many"], ["forget"]):
        with pytest.raises(Exception, match=r"(?i)no such option|missing parameter|valid integer|no command"):
            parse(words)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_commands_within_sentences_exist(file: Path) -> None:
    """`fsu alias set` in backticks names a command; `fsu request approve|deny` names two."""
    for words in re.findall(r"`fsu ([a-z][a-z |]*)", file.read_text()):
        first, *rest = words.strip().split()
        for name in first.split("|"):
            assert name in COMMANDS.commands, f"`fsu {words}`"
            group = COMMANDS.commands[name]
            if hasattr(group, "commands") and rest:
                for inner in rest[0].split("|"):
                    assert inner in group.commands, f"`fsu {words}`"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_modules_and_scripts_exist(file: Path) -> None:
    """What follows `python -m` can be imported, and what follows `python` is a file."""
    text = file.read_text()
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        if module not in ("venv", "pip", "tests.bench.NAME"):
            assert importlib.util.find_spec(module) is not None, module
    for script in re.findall(r"python3? ([\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", file.read_text()):
        if "://" not in target:
            assert (file.parent / target).exists(), target


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_cell_of_a_table_is_long(file: Path) -> None:
    for line in file.read_text().splitlines():
        if line.startswith("|"):
            assert all(len(re.sub(r"\]\([^)]*\)", "]", cell).strip()) <= 120 for cell in line.split("|")), line


def test_the_first_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.encode()) <= 14_000
