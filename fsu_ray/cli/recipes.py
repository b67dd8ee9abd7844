"""`fsu recipe`: the recipes that searches have found for a model, and which one its requests take."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Json, Who, one_line, open_app
from fsu_ray.records import Kind

recipe_app = typer.Typer(help="Recipes that searches have found for a model.", no_args_is_help=True)


@recipe_app.command("list", epilog="Example: fsu recipe list m")
@one_line
def recipe_list(model: str, json: Json = False) -> None:
    """Every recipe that a search has found for MODEL, and the resets between them, oldest first."""
    ledger = open_app().ledger
    found = ledger.recipes.all(model)
    newest = {each.kind: each.id for each in found}
    if json:
        console.print_json([_document(each, newest[each.kind] == each.id) for each in found])
    elif not found:
        console.out.print(f"no search has found a recipe for {model}; `fsu search` does", markup=False)
    else:
        rows = [
            [each.id, f"{each.kind} requests", _score(each), _digest(each), console.when(each.created_at), each.actor,
             "reset to a preset" if each.recipe is None else "in force" if newest[each.kind] == each.id else ""]
            for each in found
        ]  # fmt: skip
        columns = ["search", "for", "score", "recipe", "at", "by", ""]
        console.out.print(console.table(f"Recipes of {model}", columns, rows))


@recipe_app.command("show", epilog="Example: fsu recipe show m --kind class")
@one_line
def recipe_show(
    model: str,
    kind: Annotated[str | None, typer.Option(help="Only that of class, or of subset requests.")] = None,
    json: Json = False,
) -> None:
    """The recipe that requests of MODEL take where none is named, with what its search has measured."""
    opened = open_app()
    kinds = get_args(Kind) if kind is None else (kind,)
    taken = {each: opened.recipe_for(model, each) for each in kinds}
    if json:
        console.print_json({each: _taken(chosen) for each, chosen in taken.items()})
        return
    for each, chosen in taken.items():
        console.out.print(f"{each} requests of {model}: {recipe_words(chosen)}", markup=False)
        for key, value in _unlike_default(opened, chosen).items():
            console.out.print(f"  {key} {value}", markup=False)
        if chosen.search is not None:
            found = chosen.search
            console.out.print(f"  found {console.when(found.created_at)} by {found.actor}; measured:", markup=False)
            console.out.print_json(data=console.plain(found.evidence))
        print_passed_over(chosen)


@recipe_app.command("reset", epilog="Example: fsu recipe reset m --kind class --by on-call")
@one_line
def recipe_reset(
    model: str,
    kind: Annotated[str, typer.Option(help="Whose recipe: class, or subset requests.")],
    by: Who = None,
    json: Json = False,
) -> None:
    """Have requests of MODEL take a preset again; what was found stays on record, and queued requests as they are."""
    reset = open_app().ledger.recipes.reset(model, kind, by or OPERATOR)
    if json:
        console.print_json(_document(reset, True))
    else:
        said = f"{kind} requests of {model} take the preset default again; those that are queued keep their recipe"
        console.out.print(said, markup=False)


def recipe_words(chosen: Any) -> str:
    """Where a request's recipe is from, for people."""
    taken = str(chosen.preset) if chosen.search is None else origin_words(chosen.search)
    return f"{taken}, changed by --set" if chosen.changed else taken


def origin_words(found: Any) -> str:
    """The search that a recipe is of, for people; None: of no search."""
    return "not of a search" if found is None else f"searched {found.id}, score {found.score:.4g}"


def recipe_from(chosen: Any) -> dict[str, Any]:
    """Where a request's recipe is from, as JSON."""
    search = None if chosen.search is None else chosen.search.id
    return {"search": search, "preset": chosen.preset, "changed": chosen.changed}


def print_passed_over(chosen: Any) -> None:
    """Say on standard error which values of fsu.toml a searched recipe has others of."""
    if chosen.passed_over:
        keys = ", ".join(chosen.passed_over)
        said = f"note: [recipe] of fsu.toml is for presets, this recipe has its own {keys}; --set changes it"
        console.err.print(said, markup=False)


def _taken(chosen: Any) -> dict[str, Any]:
    found = chosen.search
    search = None if found is None else _document(found, True)
    return {"preset": chosen.preset, "digest": chosen.recipe.digest, "recipe": chosen.recipe, "search": search}


def _document(found: Any, newest: bool) -> dict[str, Any]:
    digest = None if found.recipe is None else found.recipe.digest
    return {**console.plain(found), "digest": digest, "in_force": newest and found.recipe is not None}


def _unlike_default(opened: Any, chosen: Any) -> dict[str, Any]:
    """The values in which a recipe is not the preset `default` as it would be taken here."""
    from fsu_ray.config import differences

    return differences(opened.recipe(), chosen.recipe.model_dump(mode="json"))


def _score(found: Any) -> str:
    return "" if found.score is None else f"{found.score:.4g}"


def _digest(found: Any) -> str:
    return "" if found.recipe is None else str(found.recipe.digest[:12])
