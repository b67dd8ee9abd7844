"""`fsu generator`: trained inverters and their D'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Changes, Json, ModelName, OneModel, Who, one_line
from fsu_ray.records import Generator, Kind
from fsu_ray.service import Service, connect

generator_app = typer.Typer(help="Generators: trained inverters and their D'.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="Its id, or the beginning of it.")]


@generator_app.command("list", epilog="Example: fsu generator list")
@one_line
def generator_list(model: OneModel = None, json: Json = False) -> None:
    """List generators with the metrics that the gate judges them by."""
    service = connect()
    generators = service.generators.all(model)
    if json:
        console.print_json(generators)
        return
    uses = service.generators.uses(model)
    rows = [
        [
            g.id, g.model, g.root, g.origin, uses.get(g.id, 0), f"{g.metrics['acceptance']:.3f}",
            f"{g.metrics['coverage']:.3f}", console.when(g.created_at), _state(g), g.taints,
        ]
        for g in generators
    ]  # fmt: skip
    columns = ["generator", "model", "root", "origin", "erasures", "acceptance", "coverage", "made", "state", "taints"]
    console.out.print(console.table("Generators", columns, rows))


@generator_app.command("show", epilog="Example: fsu generator show g-19")
@one_line
def generator_show(generator: Id, json: Json = False) -> None:
    """Show one generator, and its acceptance by class."""
    service = connect()
    shown = service.generators.get(generator)
    if json:
        console.print_json(shown)
        return
    source = "" if shown.transferred_from is None else f" from {shown.transferred_from}"
    request = "" if shown.request is None else f" for request {shown.request}"
    console.out.print(f"{shown.id} of {shown.model}: {shown.origin}{source} on version {shown.root}{request}")
    console.out.print(f"{_state(shown)}; erasures since its training, which it can still draw: {shown.taints}")
    console.out.print(f"weights {_path(service, shown.weights)}")
    console.out.print(f"D'      {_path(service, shown.dataset)}")
    by_class = zip(shown.metrics["acceptance_by_class"], shown.metrics["count_by_class"], strict=True)
    rows = [[k, f"{acceptance:.3f}", count] for k, (acceptance, count) in enumerate(by_class)]
    console.out.print(console.table("By class", ["class", "acceptance", "samples of D'"], rows))


@generator_app.command("import", epilog="Example: fsu generator import m gan.safetensors")
@one_line
def generator_import(
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="The state_dict of `models.generator.Generator`, as safetensors.")],
    latent: Annotated[int | None, typer.Option(min=1, help="Dimensions of its z. Default: invert.latent.")] = None,
    kind: Annotated[str, typer.Option(help="Use the recipe of class or of subset requests.")] = "class",
    recipe: Annotated[str | None, typer.Option(help="Or this preset: default, digits, deep or very-deep.")] = None,
    change: Changes = None,
    by: Who = OPERATOR,
    json: Json = False,
) -> None:
    """Take over a generator for MODEL that was trained elsewhere, and draw its D' on this machine.

    Later requests with this recipe are offered it like a generator of the model's own; the gate judges it then.
    """
    service = connect()
    resolved = service.recipes.resolve(model, cast(Kind, kind), recipe, change or ()).recipe
    with console.watching() as watcher:
        imported = service.generators.import_(model, file, resolved, latent, by, watcher.tell)
    if json:
        console.print_json(imported)
        return
    metrics = imported.metrics
    console.out.print(
        f"imported {imported.id} for {model}: acceptance >= {metrics['acceptance']:.3f}, coverage "
        f"{metrics['coverage']:.3f}, BN distance {metrics['bn_distance']:.3f}, agreement {metrics['agreement']:.3f}"
    )
    for reason in service.generators.refusals(imported, resolved):
        console.out.print(f"the gate would refuse it as it is: {reason}", markup=False)


@generator_app.command("retire", epilog="Example: fsu generator retire g-19")
@one_line
def generator_retire(generator: Id, by: Who = OPERATOR, json: Json = False) -> None:
    """Offer a generator to no further request, and delete its weights and its D'."""
    service = connect()
    retired = service.generators.retire(generator, by)
    if json:
        console.print_json(retired)
        return
    console.out.print(f"retired {retired.id}: its weights and its D' are deleted{_shared(service, retired)}")
    console.out.print(_cost(service, retired))


@generator_app.command("seal", epilog="Example: fsu generator seal g-19")
@one_line
def generator_seal(generator: Id, by: Who = OPERATOR, json: Json = False) -> None:
    """Write all masks of the model into a new D', and delete the old D' and the generator that drew it.

    The latest version labels D' from then on. The model's policy says whether the root's weights are deleted too.
    """
    service = connect()
    sealed = service.generators.seal(generator, by)
    if json:
        console.print_json(sealed)
        return
    console.out.print(
        f"sealed the D' of {sealed.id} as of version {sealed.sealed}: the old one and the weights are deleted"
        f"{_shared(service, sealed)}"
    )


@generator_app.command("tidy", epilog="Example: fsu generator tidy --model m")
@one_line
def generator_tidy(model: OneModel = None, json: Json = False) -> None:
    """Do what the policies of models want by now: purge target samples, retire generators."""
    tidied = connect().retention.tidy(model)
    if json:
        console.print_json(tidied)
        return
    for request in tidied.purged:
        console.out.print(f"purged the samples of request {request}")
    for retired in tidied.retired:
        console.out.print(f"retired generator {retired}")
    if not (tidied.purged or tidied.retired):
        console.out.print("nothing is due")


def _state(generator: Generator) -> str:
    if generator.retired:
        return f"retired ({generator.retired})"
    return f"sealed as of version {generator.sealed}" if generator.sealed else "in use"


def _path(service: Service, digest: str) -> str:
    return service.generators.path(digest) or f"{digest} (deleted)"


def _shared(service: Service, generator: Generator) -> str:
    """What was not deleted, since another generator has it too."""
    return "" if service.generators.path(generator.weights) is None else ", but what another generator uses"


def _cost(service: Service, generator: Generator) -> str:
    """What it costs to have such a generator again, by what this one took."""
    left = [g for g in service.generators.all(generator.model) if g.retired is None]
    if left:
        return f"{len(left)} other generator{'s' if len(left) > 1 else ''} of {generator.model} can still be offered"
    took = ""
    if generator.request is not None:
        seconds = (service.requests.get(generator.request).report or {}).get("seconds", {})
        took = f": this one took {sum(seconds.get(stage, 0.0) for stage in ('invert', 'synthesize')):.1f} s"
    return f"the next request of {generator.model} trains anew{took}"
