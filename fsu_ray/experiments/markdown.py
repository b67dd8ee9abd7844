"""Markdown tables and mean ± standard deviation, as the paper prints them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation of the sample; the value itself where there is one, a dash where there is none."""
    found = list(values)
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


NOTES = "<!-- Notes, written by hand. They are kept when the part above is written again. -->"


def write_above_notes(file: Path, generated: str) -> None:
    """Write `generated` to a Markdown file and keep the file's notes: its text from the line `NOTES` on."""
    try:
        _, mark, notes = file.read_text().partition(NOTES)
    except FileNotFoundError:
        mark = notes = ""
    file.write_text(f"{generated.partition(NOTES)[0].rstrip()}\n" + (f"\n{mark}{notes}" if mark else ""))
