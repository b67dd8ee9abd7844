"""`fsu model`: named lines of versions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.lineage import FEW
from fsu_ray.cli.shared import OPERATOR, Json, Who, one_line, open_app
from fsu_ray.cli.tree import plain_lines, version_tree
from fsu_ray.errors import InvalidConfig
from fsu_ray.records import ModelSpec, Policy

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
    arch: Annotated[str, typer.Option(help="lenet5, preactresnet18[:WIDTH], resnet50[:WIDTH] or torchvision:NAME.")],
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
    found = [
        (model, ledger.models.version(model.name), ledger.models.erased(model.name)) for model in ledger.models.all()
    ]
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
    """One model: its versions as a tree, what each has lost, and the aliases that point to it."""
    ledger = open_app().ledger
    model, versions, aliases = ledger.models.get(name), ledger.models.versions(name), ledger.models.aliases(name)
    if json:
        erasures = ledger.models.all_erasures(name)
        document = {"model": model, "versions": versions, "erasures": erasures, "aliases": aliases}
        console.print_json({**document, "policy": ledger.models.policy(name)})
        return
    tree = version_tree(model, versions, ledger.models.behaviours(name), aliases)
    if len(versions) <= FEW:
        console.out.print(tree)
    else:
        sys.stdout.writelines(f"{line}\n" for line in plain_lines(tree))


@model_app.command("policy", epilog="Example: fsu model policy m --approval --samples-days 30")
@one_line
def model_policy(
    name: str,
    approval: Annotated[bool | None, typer.Option(help="Requests wait for somebody else's approval.")] = None,
    samples_days: Annotated[
        str | None, typer.Option(metavar="N|never", help="Days after a request's end when its samples are purged.")
    ] = None,
    generators: Annotated[str | None, typer.Option(help="keep, retire-after-erasure or max-age.")] = None,
    generator_days: Annotated[str | None, typer.Option(metavar="N", help="The age for max-age.")] = None,
    seal: Annotated[str | None, typer.Option(help="What a seal destroys: dataset, or root too.")] = None,
    by: Who = None,
    json: Json = False,
) -> None:
    """What NAME wants done besides its erasures; with options, what it wants from now on."""
    ledger = open_app().ledger
    given = {"approval": approval, "samples_days": samples_days, "generators": generators}
    given |= {"generator_days": generator_days, "seal": seal}
    changes = {field: value for field, value in given.items() if value is not None}
    policy = ledger.models.policy(name)
    if changes:
        policy = ledger.models.set_policy(name, _changed(policy, changes), by or OPERATOR)
    if json:
        console.print_json(policy)
        return
    for field, value in policy.model_dump().items():
        said = value
        if isinstance(value, bool):  # 0 days are no "no"
            said = "yes" if value else "no"
        elif value is None:
            said = "never" if field == "samples_days" else "-"
        console.out.print(f"{field:<15} {said}", markup=False)


def _changed(policy: Policy, changes: dict[str, Any]) -> Policy:
    """`policy` with the values that were typed; raises InvalidConfig for what is none."""
    from pydantic import ValidationError

    if changes.get("samples_days") == "never":
        changes["samples_days"] = None
    if changes.get("generators", "max-age") != "max-age":
        changes.setdefault("generator_days", None)
    try:
        return Policy.model_validate({**policy.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"--{str(part).replace('_', '-')}: " for part in first["loc"])
        raise InvalidConfig(f"{where}{first['msg'].removeprefix('Value error, ')}") from None
