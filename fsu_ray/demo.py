"""`fsu demo`: a LeNet5 learns the digits and forgets two classes, one request after the other."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fsu_ray import console
from fsu_ray.records import Behaviour, Model, Request
from fsu_ray.service import Service

if TYPE_CHECKING:
    from fsu_ray.pipeline import Result

EPOCHS = 30
SAMPLES = 8
ERASED = (8, 3)


@dataclass(frozen=True)
class Demo:
    """The model of a demo and the results of its requests."""

    model: Model
    results: list[Result]


def demo(service: Service, watcher: console.Watcher, seed: int = 0, cpus: int | None = None) -> Demo:
    """Train and register a model, erase a class from 8 samples, then another. Each demo takes a new name."""
    from fsu_ray.method.datasets import draw, load, write_samples

    name = _free_name(service)
    console.err.print(f"1. train LeNet5 on scikit-learn's digits ({EPOCHS} epochs)")
    watcher.begin()
    spec, weights = service.train("digits", "lenet5", EPOCHS, seed, on_progress=watcher.tell)
    model = service.models.register(name, spec, weights, test_set="digits")
    console.err.print(f"2. registered as {name}, version 1")
    images = load("digits", "train", spec.shape)
    for target in ERASED:
        folder = _samples(service, name, target)
        write_samples(images.pixels[draw(images, [target], SAMPLES, seed)], folder)
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        service.requests.submit(name, behaviour, folder, service.recipes.preset("digits"))
        console.err.print(f"   queued: erase class {target}, from {SAMPLES} samples in {folder}")
    console.err.print("3. run both on Ray (starting it takes some seconds)")

    def on_claim(request: Request) -> None:
        watcher.begin()
        console.err.print(f"   request {request.id}: {request.behaviour.name}")

    return Demo(model, service.run(model=name, cpus=cpus, on_progress=watcher.tell, on_claim=on_claim))


def print_demo(service: Service, done: Demo) -> None:
    """Print the results of a demo, and the commands to type next."""
    out, name = console.out, done.model.name
    out.print()
    for result in done.results:
        console.print_result(result)
    accuracy = console.accuracy_table(done.results, done.model.spec.classes)
    if accuracy is not None:
        out.print(accuracy)
    seconds = [sum(result.outcome.seconds.values()) for result in done.results if result.outcome]
    if len(seconds) == len(ERASED):
        first, second = seconds
        out.print(f"The first request took {first:.1f} s of method, the second, with its generator, {second:.1f} s.")
    out.print(console.history_table(name, service.models.history(name)))
    out.print(service.places())
    samples = shlex.quote(str(_relative(_samples(service, name, ERASED[0]))))
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


def _samples(service: Service, model: str, target: int) -> Path:
    return service.settings.home / "demo" / model / f"class-{target}"


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _free_name(service: Service) -> str:
    taken = {model.name for model in service.models.all()}
    name, number = "digits-demo", 1
    while name in taken:
        number += 1
        name = f"digits-demo-{number}"
    return name
