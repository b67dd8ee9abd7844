"""`fsu demo`: a LeNet5 learns the digits and forgets two classes, one request after the other."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsu_ray import console
from fsu_ray.app import App
from fsu_ray.pipeline import Result, WorkerOptions
from fsu_ray.records import Behaviour, Model

EPOCHS = 30
SAMPLES = 8
ERASED = (8, 3)


@dataclass(frozen=True)
class Shown:
    """What a demo did."""

    model: Model
    results: list[Result]


def demo(app: App, watcher: Any, seed: int = 0, cpus: int | None = None) -> Shown:
    """Train, register, erase one class from 8 samples, then another; a second demo takes a new name."""
    from fsu_ray.method.datasets import draw, load, write_samples

    name = _free_name(app)
    console.err.print(f"1. train LeNet5 on scikit-learn's digits ({EPOCHS} epochs)")
    watcher.begin()
    spec, weights = app.train(
        "digits",
        "lenet5",
        EPOCHS,
        seed,
        on_progress=lambda done, total, metrics: watcher.tell("train", done, total, metrics),
    )
    model = app.register(name, spec, weights, test_set="digits")
    console.err.print(f"2. registered as {name}, version 1")
    images = load("digits", "train", spec.shape)
    for target in ERASED:
        folder = app.settings.home / "demo" / name / f"class-{target}"
        write_samples(images.pixels[draw(images, [target], SAMPLES, seed)], folder)
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        app.submit(name, behaviour, str(folder), app.recipe("digits"))
        console.err.print(f"   queued: erase class {target}, from {SAMPLES} samples in {folder}")
    console.err.print("3. run both on Ray (starting it takes some seconds)")

    def started(request: Any) -> None:
        watcher.begin()
        console.err.print(f"   request {request.id}: {request.behaviour.name}")

    with app.on_ray(watcher.tell, cpus) as execute:
        results = app.run(execute, WorkerOptions(model=name), started)
    return Shown(model, results)


def print_demo(app: App, shown: Shown) -> None:
    """The result as people want to see it."""
    out, name = console.out, shown.model.name
    out.print()
    for result in shown.results:
        console.print_result(result)
    made = console.accuracy_table(shown.results, shown.model.spec.classes)
    if made is not None:
        out.print(made)
    first, *later = [sum(r.outcome.seconds.values()) for r in shown.results if r.outcome]
    if later:
        out.print(f"The first request took {first:.1f} s of method, the second, with its generator, {later[0]:.1f} s.")
    out.print(console.history_table(name, app.ledger.models.history(name)))
    out.print(f"Ledger {app.settings.ledger}, artifacts {app.settings.artifacts}")
    samples = shlex.quote(str(_relative(app.settings.home / "demo" / name / f"class-{ERASED[0]}")))
    out.print("Type next:")
    out.print(f"  fsu history {name}")
    out.print(f"  fsu model show {name}")
    out.print(f"  fsu erased {name}")
    out.print(f"  fsu recheck {name}")
    out.print("  fsu generator list")
    out.print("  fsu audit verify")
    out.print(
        f"  fsu request submit --model {name} --behaviour again --target {ERASED[0]} --samples {samples}   (refused)"
    )


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _free_name(app: App) -> str:
    taken = {model.name for model in app.ledger.models.all()}
    name, number = "digits-demo", 1
    while name in taken:
        number += 1
        name = f"digits-demo-{number}"
    return name
