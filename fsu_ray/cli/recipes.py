"""`fsu recipe`: the recipes that searches have found for a model, and which recipe its requests get."""

from __future__ import annotations

from typing import Annotated, Any, cast, get_args

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Json, ModelName, Who, one_line
from fsu_ray.records import Kind, SearchedRecipe
from fsu_ray.service import connect
from fsu_ray.service.recipes import ResolvedRecipe

recipe_app = typer.Typer(help="Recipes that searches have found for a model.", no_args_is_help=True)


@recipe_app.command("list", epilog="Example: fsu recipe list m")
@one_line
def recipe_list(model: ModelName, json: Json = False) -> None:
    """List every recipe that a search has found for MODEL, and the resets between them, oldest first."""
    searches = connect().recipes.all(model)
    newest = {search.kind: search.id for search in searches}
    if json:
        console.print_json([_document(search, newest[search.kind] == search.id) for search in searches])
    elif not searches:
        console.out.print(f"no search has found a recipe for {model}; `fsu search` does", markup=False)
    else:
        rows = [
            [s.id, f"{s.kind} requests", _score(s), _digest(s), console.when(s.created_at), s.actor,
             "reset to a preset" if s.recipe is None else "in force" if newest[s.kind] == s.id else ""]
            for s in searches
        ]  # fmt: skip
        columns = ["search", "for", "score", "recipe", "at", "by", ""]
        console.out.print(console.table(f"Recipes of {model}", columns, rows))


@recipe_app.command("show", epilog="Example: fsu recipe show m --kind class")
@one_line
def recipe_show(
    model: ModelName,
    kind: Annotated[str | None, typer.Option(help="Only for class requests, or for subset requests.")] = None,
    json: Json = False,
) -> None:
    """Show the recipe that requests of MODEL get where they name none, and what its search measured."""
    service = connect()
    kinds = get_args(Kind) if kind is None else (cast(Kind, kind),)
    recipes = {each: service.recipes.resolve(model, each) for each in kinds}
    if json:
        console.print_json({each: _resolved_document(resolved) for each, resolved in recipes.items()})
        return
    for each, resolved in recipes.items():
        console.out.print(f"{each} requests of {model}: {recipe_words(resolved)}", markup=False)
        for key, value in service.recipes.differences_from_default(resolved.recipe).items():
            console.out.print(f"  {key} {value}", markup=False)
        if resolved.search is not None:
            search = resolved.search
            console.out.print(f"  found {console.when(search.created_at)} by {search.actor}; measured:", markup=False)
            console.out.print_json(data=console.plain(search.evidence))
        print_ignored_settings(resolved)


@recipe_app.command("reset", epilog="Example: fsu recipe reset m --kind class --by on-call")
@one_line
def recipe_reset(
    model: ModelName,
    kind: Annotated[str, typer.Option(help="For class requests, or for subset requests.")],
    by: Who = OPERATOR,
    json: Json = False,
) -> None:
    """Have later requests of MODEL take a preset again. Records of searches and queued requests stay as they are."""
    reset = connect().recipes.reset(model, cast(Kind, kind), by)
    if json:
        console.print_json(_document(reset, True))
    else:
        message = f"{kind} requests of {model} take the preset default again; those that are queued keep their recipe"
        console.out.print(message, markup=False)


def recipe_words(resolved: ResolvedRecipe) -> str:
    """Where the recipe of a request comes from, for people."""
    origin = str(resolved.preset) if resolved.search is None else origin_words(resolved.search)
    return f"{origin}, changed by --set" if resolved.changed else origin


def origin_words(search: SearchedRecipe | None) -> str:
    """The search of a recipe, for people."""
    return "not of a search" if search is None else f"searched {search.id}, score {_score(search)}"


def recipe_from(resolved: ResolvedRecipe) -> dict[str, Any]:
    """Where the recipe of a request comes from, as JSON."""
    search = None if resolved.search is None else resolved.search.id
    return {"search": search, "preset": resolved.preset, "changed": resolved.changed}


def print_ignored_settings(resolved: ResolvedRecipe) -> None:
    """Say on standard error for which settings of fsu.toml a searched recipe has other values."""
    if resolved.ignored_settings:
        keys = ", ".join(resolved.ignored_settings)
        note = f"note: [recipe] of fsu.toml is for presets, this recipe has its own {keys}; --set changes it"
        console.err.print(note, markup=False)


def _resolved_document(resolved: ResolvedRecipe) -> dict[str, Any]:
    search = None if resolved.search is None else _document(resolved.search, True)
    return {"preset": resolved.preset, "digest": resolved.recipe.digest, "recipe": resolved.recipe, "search": search}


def _document(search: SearchedRecipe, newest: bool) -> dict[str, Any]:
    digest = None if search.recipe is None else search.recipe.digest
    return {**console.plain(search), "digest": digest, "in_force": newest and search.recipe is not None}


def _score(search: SearchedRecipe) -> str:
    return "" if search.score is None else f"{search.score:.4g}"


def _digest(search: SearchedRecipe) -> str:
    return "" if search.recipe is None else search.recipe.digest[:12]
