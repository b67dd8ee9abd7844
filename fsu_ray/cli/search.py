"""`fsu search`: a better recipe for a model line, found without any real data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.requests import behaviour_of
from fsu_ray.cli.shared import OPERATOR, Cpus, Json, Who, interrupted, one_line, open_app
from fsu_ray.errors import TransitionRefused, UserError
from fsu_ray.records import Behaviour
from fsu_ray.work import ErasureTarget

search_app = typer.Typer()


@search_app.command("search", epilog="Example: fsu search --model m --request r-19 --trials 16")
@one_line
def search(
    model: Annotated[str, typer.Option(help="The model line that the recipe is for.")],
    request: Annotated[str | None, typer.Option(help="A request that has not ended.")] = None,
    behaviour: Annotated[str | None, typer.Option(help="Or a name for what is to be erased.")] = None,
    target: Annotated[list[int] | None, typer.Option(help="Target class; may be given several times.")] = None,
    samples: Annotated[str | None, typer.Option(help="A folder of images, an image or a Parquet file.")] = None,
    kind: Annotated[str, typer.Option(help="class or subset.")] = "class",
    recipe: Annotated[
        str | None, typer.Option(help="Where the search begins: a preset. Default: the line's recipe.")
    ] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="A value of it, e.g. invert.steps=300.")] = None,
    range_: Annotated[
        list[str] | None, typer.Option("--range", help="KEY=LOW:HIGH, KEY=A,B or KEY=VALUE; e.g. relearn.lr=1e-4:1e-2.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try.")] = 16,
    optuna: Annotated[bool, typer.Option("--optuna", help="Draw them by Optuna (extra: search).")] = False,
    seed: int = 0,
    by: Who = None,
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Search for a recipe on held-out samples and synthetic data; later requests of the line and kind use it.

    The same command again goes on where an interrupted search was. Exit code 0, also where nothing better was found.
    """
    from fsu_ray.config import parse_change
    from fsu_ray.search_space import around, narrowed

    opened = open_app()
    asked = _asked(opened, model, request, behaviour, kind, target, samples)
    changes = tuple(parse_change(text) for text in change or ())
    begin = opened.recipe_for(model, asked.behaviour.kind, recipe, changes).recipe
    space = narrowed(around(begin, asked.behaviour.kind), tuple(range_ or ()))
    order = opened.search_order(model, asked, begin)
    from fsu_ray.search import SearchOptions

    wanted = SearchOptions(space, trials, optuna, seed)
    with interrupted("the same command again goes on where this one was"), console.watching() as watcher:
        found, kept = opened.search(model, order, wanted, by or OPERATOR, watcher.tell, cpus)
    if json:
        console.print_json({"found": found, "better": found.better, "kept": kept})
        return
    _print(model, asked.behaviour, found, kept)


def _asked(
    opened: Any, model: str, request: str | None, behaviour: str | None, kind: str, target: Any, samples: str | None
) -> ErasureTarget:
    """What is to be erased: that of a request, or what was typed."""
    if (request is None) == (behaviour is None):
        raise UserError("say what is to be erased: --request ID, or --behaviour NAME --target CLASS --samples FOLDER")
    if request is not None:
        found = opened.ledger.requests.get(request)
        if found.model != model:
            raise UserError(f"request {found.id} is one of {found.model!r}, not of {model!r}")
        if found.status.is_terminal:
            raise TransitionRefused(f"request {found.id} is {found.status.value}: search for one that has not ended")
        return ErasureTarget(found.id, found.behaviour, found.samples)
    if not target or samples is None:
        raise UserError("--behaviour goes with --target CLASS and --samples FOLDER")
    return ErasureTarget("search", behaviour_of(str(behaviour), kind, target), opened.keep_samples(model, samples)[0])


def _print(model: str, behaviour: Behaviour, found: Any, kept: Any) -> None:
    evidence = found.evidence
    console.out.print(
        f"{evidence['trials']} trials in {evidence['seconds']:.0f} s, {evidence['finished']} to the end "
        f"({evidence['steps']} inversion steps in all)"
    )
    parts = ["score", "forgetting", "retention", "stability", "coverage", "passed"]
    rows = [[name, *(f"{evidence[which][part]:.4f}" for part in parts)] for name, which in
            (("begun with", "initial"), ("best", "best"))]  # fmt: skip
    console.out.print(console.table(f"Recipes for {behaviour.kind} requests of {model}", ["", *parts], rows))
    if kept is None:
        console.out.print("nothing better was found: the line keeps its recipe")
        return
    for key, value in sorted(evidence["values"].items()):
        console.out.print(f"  {key} = {value:.4g}" if isinstance(value, float) else f"  {key} = {value}")
    console.out.print(f"kept as {kept.id}: later {behaviour.kind} requests of {model} use it, and say so")
