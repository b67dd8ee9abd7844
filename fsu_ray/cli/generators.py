"""`fsu generator`: trained inverters and their D'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Json, Who, one_line, open_app

generator_app = typer.Typer(help="Generators: trained inverters and their D'.", no_args_is_help=True)


@generator_app.command("list", epilog="Example: fsu generator list")
@one_line
def generator_list(model: str | None = None, json: Json = False) -> None:
    """Generators with the figures that the gate judges them by."""
    opened = open_app()
    found = opened.ledger.generators.all(model)
    if json:
        console.print_json(found)
        return
    names = (
        [opened.ledger.models.get(m).name for m in [model]] if model else [m.name for m in opened.ledger.models.all()]
    )
    uses: dict[str, int] = {}
    for name in names:
        for erasure in opened.ledger.models.erasures(name):
            uses[erasure.generator] = uses.get(erasure.generator, 0) + 1
    rows = [
        [
            g.id,
            g.model,
            g.root,
            g.origin,
            uses.get(g.id, 0),
            f"{g.metrics['acceptance']:.3f}",
            f"{g.metrics['coverage']:.3f}",
            console.when(g.created_at),
            _state(g),
            g.taints,
        ]
        for g in found
    ]
    columns = ["generator", "model", "root", "origin", "erasures", "acceptance", "coverage", "made", "state", "taints"]
    console.out.print(console.table("Generators", columns, rows))


@generator_app.command("show", epilog="Example: fsu generator show g-19")
@one_line
def generator_show(generator: str, json: Json = False) -> None:
    """One generator; the beginning of its id is enough."""
    opened = open_app()
    found = opened.ledger.generators.get(generator)
    if json:
        console.print_json(found)
        return
    source = "" if found.transferred_from is None else f" from {found.transferred_from}"
    request = "" if found.request is None else f" for request {found.request}"
    console.out.print(f"{found.id} of {found.model}: {found.origin}{source} on version {found.root}{request}")
    console.out.print(f"{_state(found)}; erasures since its training, which it can still draw: {found.taints}")
    console.out.print(f"weights {_place(opened, found.weights)}")
    console.out.print(f"D'      {_place(opened, found.dataset)}")
    rows = [
        [k, f"{a:.3f}", n]
        for k, (a, n) in enumerate(
            zip(found.metrics["acceptance_by_class"], found.metrics["count_by_class"], strict=True)
        )
    ]
    console.out.print(console.table("By class", ["class", "acceptance", "samples of D'"], rows))


@generator_app.command("import", epilog="Example: fsu generator import m gan.safetensors")
@one_line
def generator_import(
    model: str,
    file: Annotated[Path, typer.Argument(help="safetensors of `models.generator.Generator.state_dict()`.")],
    latent: Annotated[int | None, typer.Option(min=1, help="Dimensions of its z. Default: invert.latent.")] = None,
    kind: Annotated[str, typer.Option(help="The recipe is that of class, or of subset requests.")] = "class",
    recipe: Annotated[str | None, typer.Option(help="Another recipe: default, digits, deep or very-deep.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="A value of it, e.g. synthesize.seed=1.")] = None,
    by: Who = None,
    json: Json = False,
) -> None:
    """Take over a generator for MODEL that was trained elsewhere, and draw its D' now, on this machine.

    Requests with this recipe are offered it like one of the model's own; the gate judges it then.
    """
    from fsu_ray.app import read_weights
    from fsu_ray.config import parse_change
    from fsu_ray.gate import refuse_generator

    opened, weights = open_app(), read_weights(file)
    chosen = opened.recipe_for(model, kind, recipe, tuple(parse_change(text) for text in change or ())).recipe
    with console.watching() as watcher:
        found = opened.import_generator(
            model, weights, chosen, latent, by or OPERATOR, lambda *heard: watcher.tell("synthesize", *heard)
        )
    if json:
        console.print_json(found)
        return
    metrics = found.metrics
    console.out.print(
        f"imported {found.id} for {model}: acceptance >= {metrics['acceptance']:.3f}, coverage "
        f"{metrics['coverage']:.3f}, BN distance {metrics['bn_distance']:.3f}, agreement {metrics['agreement']:.3f}"
    )
    for reason in refuse_generator(metrics, chosen.gate):
        console.out.print(f"the gate would refuse it as it is: {reason}", markup=False)


@generator_app.command("retire", epilog="Example: fsu generator retire g-19")
@one_line
def generator_retire(generator: str, by: Who = None, json: Json = False) -> None:
    """Offer a generator to no request any more, and delete its weights and its D'."""
    from fsu_ray.retention import retire

    opened = open_app()
    found = retire(
        opened.ledger, opened.artifacts, opened.ledger.generators.get(generator).id, "operator", by or OPERATOR
    )
    if json:
        console.print_json(found)
        return
    console.out.print(f"retired {found.id}: its weights and its D' are deleted{_kept(opened, found)}")
    console.out.print(_cost(opened, found))


@generator_app.command("seal", epilog="Example: fsu generator seal g-19")
@one_line
def generator_seal(generator: str, by: Who = None, json: Json = False) -> None:
    """Write all masks of the line into a new D', and destroy the old one and the generator that drew it.

    The latest version labels D' from now on. The model's policy says whether the root's weights go too.
    """
    opened = open_app()
    found = opened.seal(generator, by or OPERATOR)
    if json:
        console.print_json(found)
        return
    console.out.print(
        f"sealed the D' of {found.id} as of version {found.sealed}: the old one and the weights are deleted"
        f"{_kept(opened, found)}"
    )


@generator_app.command("tidy", epilog="Example: fsu generator tidy --model m")
@one_line
def generator_tidy(model: str | None = None, json: Json = False) -> None:
    """Do what the policies of models want done by now: purge target samples, retire generators."""
    from fsu_ray.retention import tidy

    opened = open_app()
    if model is not None:
        opened.ledger.models.get(model)
    done = tidy(opened.ledger, opened.artifacts, model)
    if json:
        console.print_json(done)
        return
    for request in done.purged:
        console.out.print(f"purged the samples of request {request}")
    for retired in done.retired:
        console.out.print(f"retired generator {retired}")
    if not (done.purged or done.retired):
        console.out.print("nothing is due")


def _state(generator: Any) -> str:
    if generator.retired:
        return f"retired ({generator.retired})"
    return f"sealed as of version {generator.sealed}" if generator.sealed else "in use"


def _place(opened: Any, digest: str) -> str:
    return str(opened.artifacts.path(digest)) if opened.artifacts.has(digest) else f"{digest} (deleted)"


def _kept(opened: Any, generator: Any) -> str:
    """What was not deleted, since another generator has it too."""
    return ", but what another generator uses" if opened.artifacts.has(generator.weights) else ""


def _cost(opened: Any, generator: Any) -> str:
    """What it takes to have one again, by what it took the last time."""
    report = {} if generator.request is None else opened.ledger.requests.get(generator.request).report or {}
    seconds = report.get("seconds", {})
    spent = sum(seconds.get(stage, 0.0) for stage in ("invert", "synthesize"))
    left = [g for g in opened.ledger.generators.all(generator.model) if g.retired is None]
    if left:
        return f"{len(left)} other generator{'s' if len(left) > 1 else ''} of {generator.model} can still be offered"
    took = "" if generator.request is None else f": this one took {spent:.1f} s"
    return f"the next request of {generator.model} trains anew{took}"
