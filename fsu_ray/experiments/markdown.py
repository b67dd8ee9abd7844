"""Markdown: tables, mean ± standard deviation as the paper prints it, and files with notes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; of one value the value, of none a dash."""
    numbers = list(values)
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


NOTES = "<!-- Notes, written by hand. They are kept when the part above is written again. -->"


def write_above_notes(file: Path, generated: str) -> None:
    """Write `generated` to a Markdown file and keep the file's notes: its text from the line `NOTES` on."""
    try:
        _, mark, notes = file.read_text().partition(NOTES)
    except FileNotFoundError:
        mark = notes = ""
    file.write_text(f"{generated.partition(NOTES)[0].rstrip()}\n" + (f"\n{mark}{notes}" if mark else ""))
