"""Median seconds of an inversion step: one worker with two threads against two workers with one thread each.

    python -m tests.bench.scaling [--arch lenet5] [--steps 30] [--rounds 3] [--precision auto]

Ray is not involved. Both sides take the same steps (the same batches and draws) in processes of their own; the two
workers form a gloo group. The difference is the cost of data parallelism: sums over workers instead of threads inside
an operator. A step is everything that `invert()` does between two checkpoints: draws, losses, gradients, update.
"""

from __future__ import annotations

import argparse
import statistics
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

WARM_UP = 3  # steps that are not counted


def time_steps(rank: int, size: int, threads: int, folder: str, arch: str, recipe: dict[str, Any]) -> None:
    """Run one rank's inversion; write the seconds of each step to `folder`/steps-`rank`."""
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.manual_seed(0)
    spec = ModelSpec(arch=arch, channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.3,))
    classifier = Classifier(spec).eval().to(memory_format=torch.channels_last)
    invert_recipe = InvertRecipe.model_validate(recipe)
    ends: list[float] = []  # the moment at which each step ended, seconds
    run = invert.begin(classifier, invert_recipe)
    invert.invert(
        classifier,
        invert_recipe,
        run,
        checkpoint=lambda _: ends.append(time.perf_counter()),
        every=1,
        group=Group.current(),
    )
    steps = [after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]
    torch.save(steps, Path(folder) / f"steps-{rank}")
    if size > 1:
        dist.destroy_process_group()


def median_step(size: int, threads: int, arch: str, recipe: dict[str, Any]) -> float:
    """The median seconds of a step of `size` workers, measured by rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(time_steps, (size, threads, folder, arch, recipe), nprocs=size)  # type: ignore[no-untyped-call]
        return float(statistics.median(torch.load(Path(folder) / "steps-0")))


def main() -> None:
    """Print both medians and their ratio, a line a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="lenet5")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto", help="auto, bf16 or float32")
    options = parser.parse_args()
    # A step is timed from the checkpoint before it to its own, and `invert` makes no checkpoint at the last step.
    recipe = {"steps": options.steps + WARM_UP + 2, "batch": options.batch, "precision": options.precision}
    print(f"{options.arch}, batch {options.batch}, {options.precision}, {options.steps} steps a round", flush=True)
    for _ in range(options.rounds):
        one, two = (median_step(size, threads, options.arch, recipe) for size, threads in ((1, 2), (2, 1)))
        medians = f"1 worker x 2 threads {1000 * one:.0f} ms, 2 workers x 1 thread {1000 * two:.0f} ms"
        print(f"{medians}: {two / one:.2f} times", flush=True)


if __name__ == "__main__":
    main()
