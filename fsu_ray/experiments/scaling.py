"""One worker with two threads against two workers with one each: seconds of an inversion step, without Ray.

    python -m fsu_ray.experiments.scaling [--arch lenet5] [--steps 30] [--rounds 3] [--precision auto]

Both take the same steps (the same batch, the same draws), in turn, in processes of their own that meet over gloo. The
difference is what the data parallel form costs or gains: its sums over the workers against threads inside an operator.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from fsu_ray.method import invert
from fsu_ray.method.group import Group
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import InvertRecipe
from fsu_ray.records import ModelSpec

WARM = 3  # steps that are not counted


def timed(rank: int, size: int, threads: int, folder: str, arch: str, recipe: dict[str, Any]) -> None:
    """One rank of a group: its inversion, and the seconds of each step in a file of its own."""
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.manual_seed(0)
    spec = ModelSpec(arch=arch, channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.3,))
    classifier = Classifier(spec).eval().to(memory_format=torch.channels_last)
    asked = InvertRecipe.model_validate(recipe)
    run, taken = invert.begin(classifier, asked), []
    honest = invert.losses

    def counted(*words: Any) -> Any:
        taken.append(time.perf_counter())
        return honest(*words)

    invert.losses = counted  # type: ignore[assignment]
    invert.invert(classifier, asked, run, group=Group.current())
    steps = [after - before for before, after in zip(taken[WARM:], taken[WARM + 1 :], strict=False)]
    torch.save(steps, Path(folder) / f"steps-{rank}")
    if size > 1:
        dist.destroy_process_group()


def median_step(size: int, threads: int, arch: str, recipe: dict[str, Any]) -> float:
    """The median seconds of a step of a group of `size`."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(timed, (size, threads, folder, arch, recipe), nprocs=size)  # type: ignore[no-untyped-call]
        return float(statistics.median(torch.load(Path(folder) / "steps-0")))


def main() -> None:
    """Print both medians and their ratio, a line a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="lenet5")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    recipe = {"steps": options.steps + WARM + 1, "batch": options.batch, "precision": options.precision}
    print(f"{options.arch}, batch {options.batch}, {options.precision}, {options.steps} steps a round")
    for _ in range(options.rounds):
        one, two = (median_step(size, threads, options.arch, recipe) for size, threads in ((1, 2), (2, 1)))
        print(
            f"1 worker x 2 threads {1000 * one:.0f} ms, 2 workers x 1 thread {1000 * two:.0f} ms: {two / one:.2f} times"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
