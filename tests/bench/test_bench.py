"""The benchmarks can be started as their docstrings say, and time real steps of the inversion."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsu_ray.recipes import InvertRecipe
from fsu_ray.records import ModelSpec
from tests.bench import inversion_step, scaling

HERE = Path(__file__).parent
BENCHES = sorted(file.stem for file in HERE.glob("[!t]*.py") if "__main__" in file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHES if name not in ("same_results", "mutants")])
def test_every_benchmark_quotes_its_own_command(name: str) -> None:
    """`python -m tests.bench.NAME` stands in the docstring of each module, and starts it."""
    assert re.search(rf"^ +(FSU_DATA=\S+ )?python -m tests\.bench\.{name}\b", (HERE / f"{name}.py").read_text(), re.M)
    command = [sys.executable, "-m", f"tests.bench.{name}", "--help"]
    answer = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("usage: ")


def test_scaling_times_the_steps_of_invert(tmp_path: Path) -> None:
    """As many positive times as there are steps between two checkpoints, without the warm-up."""
    threads = torch.get_num_threads()
    try:
        recipe = {"steps": scaling.WARM_UP + 4, "batch": 20, "width": 2}
        scaling.time_steps(0, 1, threads, str(tmp_path), "lenet5", recipe)
    finally:
        torch.set_num_threads(threads)
    steps = torch.load(tmp_path / "steps-0")
    assert len(steps) == 2
    assert min(steps) > 0


def test_the_plain_step_computes_the_same_losses() -> None:
    """The plain form is a fair opponent: its losses agree with those of `invert` up to rounding, for equal weights."""
    from fsu_ray.method import invert
    from fsu_ray.models.classifier import Classifier

    spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.3,))
    recipe = InvertRecipe(batch=20, width=2, precision="float32")
    torch.manual_seed(0)
    classifier = Classifier(spec).eval()
    built = invert.begin(classifier, recipe).generator
    plain = inversion_step.PlainGenerator(spec, recipe.width, recipe.latent)
    plain.load_state_dict(built.state_dict())
    expected = invert.losses(classifier, built, recipe, 0)
    losses = inversion_step.plain_losses(classifier, plain, recipe, 0)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-3, atol=1e-4)
