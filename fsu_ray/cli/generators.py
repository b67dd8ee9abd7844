"""`fsu generator`: trained inverters and their D'."""

from __future__ import annotations

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Json, one_line, open_app

generator_app = typer.Typer(help="Generators: trained inverters and their D'.", no_args_is_help=True)


@generator_app.command("list", epilog="Example: fsu generator list")
@one_line
def generator_list(model: str | None = None, json: Json = False) -> None:
    """Generators with the figures that the gate judges them by."""
    opened = open_app()
    found = opened.ledger.generators(model)
    if json:
        console.print_json(found)
        return
    names = [opened.ledger.model(m).name for m in [model]] if model else [m.name for m in opened.ledger.models()]
    uses: dict[str, int] = {}
    for name in names:
        for erasure in opened.ledger.erasures(name):
            uses[erasure.generator] = uses.get(erasure.generator, 0) + 1
    rows = [
        [
            g.id,
            g.model,
            g.root,
            g.origin,
            uses.get(g.id, 0),
            f"{g.figures['acceptance']:.3f}",
            f"{g.figures['coverage']:.3f}",
            console.when(g.created_at),
        ]
        for g in found
    ]
    columns = ["generator", "model", "root", "origin", "erasures", "acceptance", "coverage", "made"]
    console.out.print(console.table("Generators", columns, rows))


@generator_app.command("show", epilog="Example: fsu generator show g-19")
@one_line
def generator_show(generator: str, json: Json = False) -> None:
    """One generator; the beginning of its id is enough."""
    opened = open_app()
    found = opened.ledger.generator(generator)
    if json:
        console.print_json(found)
        return
    console.out.print(
        f"{found.id} of {found.model}: {found.origin} on version {found.root} for request {found.request}"
    )
    console.out.print(f"weights {opened.artifacts.path(found.weights)}")
    console.out.print(f"D'      {opened.artifacts.path(found.dataset)}")
    rows = [
        [k, f"{a:.3f}", n]
        for k, (a, n) in enumerate(
            zip(found.figures["acceptance_by_class"], found.figures["count_by_class"], strict=True)
        )
    ]
    console.out.print(console.table("By class", ["class", "acceptance", "samples of D'"], rows))
