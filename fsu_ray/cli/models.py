"""`fsu model`: models and their versions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.lineage import FEW
from fsu_ray.cli.shared import OPERATOR, Json, ModelName, Who, fail_as, one_line
from fsu_ray.cli.tree import plain_lines, version_tree
from fsu_ray.errors import InvalidConfig
from fsu_ray.records import ModelSpec, Policy
from fsu_ray.service import connect

model_app = typer.Typer(help="Models and their versions.", no_args_is_help=True)


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
    name: Annotated[str, typer.Option(help="The name of the new model.")],
    arch: Annotated[str, typer.Option(help="lenet5, preactresnet18[:WIDTH], resnet50[:WIDTH] or torchvision:NAME.")],
    weights: Annotated[Path, typer.Option(help="A safetensors file of the network's state_dict.")],
    input_: Annotated[str, typer.Option("--input", help="CHANNELSxHEIGHTxWIDTH.")],
    classes: Annotated[int, typer.Option(help="Number of classes.")],
    mean: Annotated[
        str, typer.Option(help="Mean of the pixels, which are in [0, 1]: one number, or one for each channel.")
    ] = "0",
    std: Annotated[str, typer.Option(help="Standard deviation of the pixels, likewise.")] = "1",
    flip: Annotated[bool, typer.Option(help="Say that it was trained with horizontal flips.")] = False,
    test_set: Annotated[
        str | None, typer.Option(help="To measure accuracy: digits, mnist, cifar10, an image folder or a Parquet file.")
    ] = None,
    json: Json = False,
) -> None:
    """Register trained weights as version 1 of a new model."""
    channels, height, width = _shape(input_)
    with fail_as(InvalidConfig, "--mean, --std or --input"):
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
    model = connect().models.register(name, spec, weights, test_set)
    if json:
        console.print_json(model)
    else:
        console.out.print(f"registered {name}: {arch}, {input_}, {classes} classes, version 1")


@model_app.command("update", epilog="Example: fsu model update m --weights tuned.safetensors")
@one_line
def model_update(
    name: ModelName,
    weights: Annotated[Path, typer.Option(help="A safetensors file of the network's state_dict.")],
    json: Json = False,
) -> None:
    """Add a version of MODEL that was trained further outside. It is the root of later erasures."""
    version = connect().models.update(name, weights)
    if json:
        console.print_json(version)
    else:
        console.out.print(f"{name}: version {version.number}, a new root")


@model_app.command("list", epilog="Example: fsu model list --json")
@one_line
def model_list(json: Json = False) -> None:
    """List all models with their latest version and what is erased from it."""
    models = connect().models
    listed = [
        (model, models.version(model.name), [erasure.behaviour for erasure in models.erased(model.name)])
        for model in models.all()
    ]
    if json:
        console.print_json([{"model": m, "latest": v, "erased": behaviours} for m, v, behaviours in listed])
        return
    rows = [
        [
            m.name,
            m.spec.arch,
            "x".join(map(str, m.spec.shape)),
            m.spec.classes,
            v.number,
            ", ".join(behaviour.name for behaviour in behaviours),
        ]
        for m, v, behaviours in listed
    ]
    console.out.print(console.table("Models", ["name", "architecture", "input", "classes", "version", "erased"], rows))


@model_app.command("show", epilog="Example: fsu model show digits-demo")
@one_line
def model_show(name: ModelName, json: Json = False) -> None:
    """Show the versions of a model as a tree, with what was erased in each and the aliases that point to it."""
    models = connect().models
    model, versions, aliases = models.get(name), models.versions(name), models.aliases(name)
    if json:
        erasures = models.all_erasures(name)
        document = {"model": model, "versions": versions, "erasures": erasures, "aliases": aliases}
        console.print_json({**document, "policy": models.policy(name)})
        return
    tree = version_tree(model, versions, models.erased_by_version(name), aliases)
    if len(versions) <= FEW:
        console.out.print(tree)
    else:
        sys.stdout.writelines(f"{line}\n" for line in plain_lines(tree))


@model_app.command("policy", epilog="Example: fsu model policy m --approval --samples-days 30")
@one_line
def model_policy(
    name: ModelName,
    approval: Annotated[bool | None, typer.Option(help="Requests wait for the approval of somebody else.")] = None,
    samples_days: Annotated[
        str | None, typer.Option(metavar="N|never", help="Purge target samples so many days after the request's end.")
    ] = None,
    generators: Annotated[
        str | None, typer.Option(help="keep, retire-after-erasure, or max-age (with --generator-days).")
    ] = None,
    generator_days: Annotated[str | None, typer.Option(metavar="N", help="The age for max-age.")] = None,
    seal: Annotated[
        str | None,
        typer.Option(help="What a seal deletes: dataset (D' and generator), or root (the root's weights too)."),
    ] = None,
    by: Who = OPERATOR,
    json: Json = False,
) -> None:
    """Show the policy of a model: approval and retention. With options, set it from now on; the others stay."""
    models = connect().models
    typed = {"approval": approval, "samples_days": samples_days, "generators": generators}
    typed |= {"generator_days": generator_days, "seal": seal}
    changes = {field: value for field, value in typed.items() if value is not None}
    policy = models.policy(name)
    if changes:
        policy = models.set_policy(name, _changed(policy, changes), by)
    if json:
        console.print_json(policy)
        return
    for field, value in policy.model_dump().items():
        shown = value
        if isinstance(value, bool):  # 0 days are not "no"
            shown = "yes" if value else "no"
        elif value is None:
            shown = "never" if field == "samples_days" else "-"
        console.out.print(f"{field:<15} {shown}", markup=False)


def _changed(policy: Policy, changes: dict[str, Any]) -> Policy:
    """`policy` with the values that were typed; raises InvalidConfig for a value that it cannot have."""
    if changes.get("samples_days") == "never":
        changes["samples_days"] = None
    if changes.get("generators", "max-age") != "max-age":
        changes.setdefault("generator_days", None)
    with fail_as(InvalidConfig, "--generators", options=True):
        return Policy.model_validate({**policy.model_dump(), **changes})
