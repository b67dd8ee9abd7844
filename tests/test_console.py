"""What a terminal shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fsu_ray import console


def test_progress_bars_show_stage_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal each stage has a bar with its latest metrics."""
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=160))
    with console.watching() as watcher:
        watcher.begin()
        watcher.tell("invert", 10, 20, {"bn": 2.5})
        watcher.tell("invert", 20, 20, {"bn": 1.25})
    assert "invert" in screen.getvalue()
    assert "20/20" in screen.getvalue()
    assert "bn 1.25" in screen.getvalue()
