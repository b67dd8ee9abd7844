"""`fsu model`: named lines of versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Json, one_line, open_app
from fsu_ray.errors import InvalidConfig
from fsu_ray.records import ModelSpec

model_app = typer.Typer(help="Models: named lines of versions.", no_args_is_help=True)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidConfig(f"{option} takes numbers with commas between them, got {text!r}") from None


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise InvalidConfig(f"--input takes CHANNELSxHEIGHTxWIDTH such as 3x32x32, got {text!r}")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


@model_app.command(
    "register",
    epilog="Example: fsu model register --name m --arch torchvision:resnet18 --weights w.safetensors "
    "--input 3x32x32 --classes 10 --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26",
)
@one_line
def model_register(
    name: Annotated[str, typer.Option(help="The name of the new line.")],
    arch: Annotated[str, typer.Option(help="lenet5, preactresnet18[:WIDTH], resnet50 or torchvision:NAME.")],
    weights: Annotated[Path, typer.Option(help="A safetensors file of the network's state_dict.")],
    input_: Annotated[str, typer.Option("--input", help="CHANNELSxHEIGHTxWIDTH.")],
    classes: Annotated[int, typer.Option(help="Number of classes.")],
    mean: Annotated[str, typer.Option(help="Mean of pixels in [0, 1], one or one a channel.")] = "0",
    std: Annotated[str, typer.Option(help="Deviation of pixels in [0, 1], likewise.")] = "1",
    flip: Annotated[bool, typer.Option(help="It was trained with horizontal flips.")] = False,
    test_set: Annotated[str | None, typer.Option(help="digits, mnist, cifar10, a folder or a Parquet file.")] = None,
    json: Json = False,
) -> None:
    """Register trained weights as version 1 of a new model."""
    from pydantic import ValidationError

    from fsu_ray.app import read_weights

    channels, height, width = _shape(input_)
    try:
        spec = ModelSpec(
            arch=arch,
            channels=channels,
            height=height,
            width=width,
            classes=classes,
            mean=_numbers(mean, "--mean"),
            std=_numbers(std, "--std"),
            flip=flip,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidConfig(
            f"{'.'.join(str(p) for p in first['loc']) or '--mean, --std or --input'}: {first['msg']}"
        ) from None
    made = open_app().register(name, spec, read_weights(weights), test_set)
    if json:
        console.print_json(made)
    else:
        console.out.print(f"registered {name}: {arch}, {input_}, {classes} classes, version 1")


@model_app.command("update", epilog="Example: fsu model update m --weights tuned.safetensors")
@one_line
def model_update(name: str, weights: Annotated[Path, typer.Option()], json: Json = False) -> None:
    """Add a version of NAME that was trained further outside; it is the root of later erasures."""
    from fsu_ray.app import read_weights

    version = open_app().update(name, read_weights(weights))
    if json:
        console.print_json(version)
    else:
        console.out.print(f"{name}: version {version.number}, a new root")


@model_app.command("list", epilog="Example: fsu model list --json")
@one_line
def model_list(json: Json = False) -> None:
    """All models with their latest version."""
    ledger = open_app().ledger
    found = [(model, ledger.versions(model.name)[-1], ledger.erasures(model.name)) for model in ledger.models()]
    if json:
        console.print_json([{"model": m, "latest": v, "erased": [e.behaviour for e in gone]} for m, v, gone in found])
        return
    rows = [
        [
            m.name,
            m.spec.arch,
            "x".join(map(str, m.spec.shape)),
            m.spec.classes,
            v.number,
            ", ".join(e.behaviour.name for e in gone),
        ]
        for m, v, gone in found
    ]
    console.out.print(console.table("Models", ["name", "architecture", "input", "classes", "version", "erased"], rows))


@model_app.command("show", epilog="Example: fsu model show digits-demo")
@one_line
def model_show(name: str, json: Json = False) -> None:
    """One model: its versions, and what each of them no longer does."""
    opened = open_app()
    model, versions = opened.ledger.model(name), opened.ledger.versions(name)
    erasures = opened.ledger.erasures(name)
    if json:
        console.print_json({"model": model, "versions": versions, "erasures": erasures})
        return
    spec = model.spec
    console.out.print(
        f"{name}: {spec.arch}, {'x'.join(map(str, spec.shape))}, {spec.classes} classes, "
        f"mean {spec.mean}, std {spec.std}"
    )
    by_version = {e.version: e for e in erasures}
    rows = []
    for v in versions:
        erasure = by_version.get(v.number)
        gone = f"{erasure.behaviour.name} ({erasure.generator_use})" if erasure else ""
        rows.append(
            [
                v.number,
                "" if v.parent is None else v.parent,
                v.root,
                gone,
                console.when(v.created_at),
                v.weights[:16],
            ]
        )
    console.out.print(console.table("Versions", ["version", "parent", "root", "erased", "at", "weights"], rows))
