"""The README's first command, in an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fsu_ray import demo
from fsu_ray.method.datasets import write_samples
from fsu_ray.pipeline import Result
from fsu_ray.records import Behaviour
from fsu_ray.service import Service


@pytest.mark.ray
def test_the_demo_erases_two_classes_with_one_generator(home: Path) -> None:
    """Exit 0; each erased class at most 2 %, what is kept within 2 points; the second request reuses the generator.
    Half of the demo's inversion steps, in smaller batches, do for that."""
    (home / "fsu.toml").write_text("[recipe.invert]\nsteps = 200\nbatch = 100\n")
    command = [str(Path(sys.executable).parent / "fsu"), "demo", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(ended.stdout)
    first, second = (result["outcome"] for result in shown["results"])
    assert (first["generator_use"], second["generator_use"]) == ("trained", "reused")
    assert "invert" not in second["seconds"]
    gone: list[int] = []
    for outcome, target in ((first, demo.ERASED[0]), (second, demo.ERASED[1])):
        gone.append(target)
        before, after = first["report"]["test"]["before"]["by_class"], outcome["report"]["test"]["after"]["by_class"]
        assert all(after[k] <= 0.02 for k in gone)
        kept = [k for k in range(10) if k not in gone]
        assert sum(before[k] - after[k] for k in kept) / len(kept) <= 0.02
    assert [e["event"] for e in shown["history"]].count("erased") == 2


def test_a_second_demo_takes_a_new_name(service: Service, trained: Any) -> None:
    """`fsu demo` can be run twice in one folder."""
    assert demo._free_name(service) == "digits-demo"
    service.models.register("digits-demo", trained.spec, trained.weights)
    assert demo._free_name(service) == "digits-demo-2"


def test_a_demo_whose_runs_break_is_printed_all_the_same(
    service: Service, trained: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each result is a line; no times are compared."""
    model = service.models.register("m", trained.spec, trained.weights)
    samples = home / "samples"
    write_samples(trained.train.pixels[:2], samples)
    request, _ = service.requests.submit("m", Behaviour(name="eight", kind="class", targets=(8,)), samples)
    for results in ([Result(request, None, None)], []):
        demo.print_demo(service, demo.Demo(model, results))
        printed = capsys.readouterr().out
        assert "The first request took" not in printed
        assert "Type next:" in printed
