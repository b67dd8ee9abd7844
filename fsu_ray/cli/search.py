"""`fsu search`: a better recipe for a model, found without any real data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Changes, Cpus, Json, Who, behaviour_of, interrupted, one_line
from fsu_ray.errors import UserError
from fsu_ray.records import SearchedRecipe
from fsu_ray.service import connect

if TYPE_CHECKING:
    from fsu_ray.search import SearchResult

search_app = typer.Typer()


@search_app.command("search", epilog="Example: fsu search --model m --request r-19 --trials 16")
@one_line
def search(
    model: Annotated[str, typer.Option(help="The model that the recipe is for.")],
    request: Annotated[
        str | None, typer.Option(help="Search for what this request erases; it must not have ended.")
    ] = None,
    behaviour: Annotated[str | None, typer.Option(help="Or a name for what is to be erased.")] = None,
    target: Annotated[list[int] | None, typer.Option(help="Target class; may be repeated.")] = None,
    samples: Annotated[str | None, typer.Option(help="A folder of images, an image or a Parquet file.")] = None,
    kind: Annotated[str, typer.Option(help="class or subset.")] = "class",
    recipe: Annotated[
        str | None, typer.Option(help="Begin at this preset. Default: the recipe that requests of the model get.")
    ] = None,
    change: Changes = None,
    range_: Annotated[
        list[str] | None,
        typer.Option("--range", help="KEY=LOW:HIGH, KEY=A,B or KEY=VALUE, e.g. relearn.lr=1e-4:1e-2; may be repeated."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many recipes to try.")] = 16,
    optuna: Annotated[bool, typer.Option("--optuna", help="Let Optuna draw them (needs the extra `search`).")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    by: Who = OPERATOR,
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Search for a recipe by held-out samples and synthetic data. Later requests of this model and kind use it.

    The same command again continues an interrupted search. Exit code 0 also where no better recipe was found.
    """
    if behaviour is not None and (request is not None or not target):
        raise UserError("--behaviour goes with --target CLASS and --samples FOLDER, and without --request")
    erased = None if behaviour is None else behaviour_of(behaviour, kind, target or [])
    service = connect()
    with interrupted("the same command continues the search"), console.watching() as watcher:
        result, kept = service.recipes.search(
            model, request=request, behaviour=erased, samples=samples, preset=recipe, changes=change or (),
            ranges=range_ or (), trials=trials, optuna=optuna, seed=seed, actor=by, cpus=cpus, on_progress=watcher.tell,
        )  # fmt: skip
    if json:
        console.print_json({"found": result, "better": result.better, "kept": kept})
        return
    searched = service.requests.get(request).behaviour.kind if request is not None else kind
    _print(model, searched, result, kept)


def _print(model: str, kind: str, result: SearchResult, kept: SearchedRecipe | None) -> None:
    evidence = result.evidence
    console.out.print(
        f"{evidence['trials']} trials in {evidence['seconds']:.0f} s, {evidence['finished']} to the end "
        f"({evidence['steps']} inversion steps in all)"
    )
    parts = ["score", "forgetting", "retention", "stability", "coverage", "passed"]
    rows = [[name, *(f"{evidence[which][part]:.4f}" for part in parts)] for name, which in
            (("begun with", "initial"), ("best", "best"))]  # fmt: skip
    console.out.print(console.table(f"Recipes for {kind} requests of {model}", ["", *parts], rows))
    if kept is None:
        console.out.print("no better recipe was found: the model keeps its recipe")
        return
    for key, value in sorted(evidence["values"].items()):
        console.out.print(f"  {key} = {value:.4g}" if isinstance(value, float) else f"  {key} = {value}")
    console.out.print(f"kept as {kept.id}: later {kind} requests of {model} use it, and say so")
