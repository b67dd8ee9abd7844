"""`fsu alias`, `fsu erased`, `fsu recheck`: what points where, what is gone from it, and whether it still is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Json, Who, one_line, open_app

alias_app = typer.Typer(help="Aliases: names such as production that point to a version.", no_args_is_help=True)
lineage_app = typer.Typer()
"""The commands `erased` and `recheck`, without a group of their own."""

Reference = Annotated[str, typer.Argument(metavar="MODEL[@VERSION|@ALIAS]", help="The latest version, or that one.")]
FEW = 200
"""Up to so many rows come as a table; more as plain lines, since `rich` takes 0.4 ms a row."""


@alias_app.command("set", epilog="Example: fsu alias set m production 7 --by on-call")
@one_line
def alias_set(
    model: str,
    alias: str,
    version: Annotated[str, typer.Argument(help="A version's number, or another alias that points to it.")],
    force: Annotated[bool, typer.Option("--force", help="Also to a version that still has an erased behaviour.")] = (
        False
    ),
    reason: Annotated[str | None, typer.Option(help="One word, such as the number of a ticket.")] = None,
    by: Who = None,
    json: Json = False,
) -> None:
    """Have ALIAS of MODEL point to VERSION.

    A version that still has a behaviour which another version has lost is refused without --force and --reason.
    """
    ledger = open_app().ledger
    _, target = ledger.models.resolve(f"{model}@{version}")
    move = ledger.models.move_alias(model, alias, target.number, by or OPERATOR, force=force, reason=reason)
    if json:
        console.print_json(move)
        return
    before = "" if move.previous is None else f", before to version {move.previous}"
    forced = f" (forced: {move.reason})" if move.forced else ""
    console.out.print(f"{model}@{alias} points to version {move.version}{before}{forced}", markup=False)


@alias_app.command("list", epilog="Example: fsu alias list m")
@one_line
def alias_list(model: str, json: Json = False) -> None:
    """Where the aliases of MODEL point."""
    found = open_app().ledger.models.aliases(model)
    if json:
        console.print_json(found)
    elif not found:
        console.out.print(f"{model} has no aliases; `fsu alias set` makes one", markup=False)
    else:
        rows = [[m.alias, m.version, console.when(m.created_at), m.actor] for m in found.values()]
        console.out.print(console.table(f"Aliases of {model}", ["alias", "version", "since", "by"], rows))


@alias_app.command("history", epilog="Example: fsu alias history m")
@one_line
def alias_history(model: str, json: Json = False) -> None:
    """Every move of an alias of MODEL, oldest first."""
    moves = open_app().ledger.models.alias_moves(model)
    if json:
        console.print_json(moves)
        return
    rows = [
        [console.when(m.created_at), m.alias, m.version, m.previous, "forced" if m.forced else "", m.reason, m.actor]
        for m in moves
    ]
    print_rows(f"Aliases of {model}", ["at", "alias", "version", "before", "", "reason", "by"], rows)


@lineage_app.command("erased", epilog="Example: fsu erased m@production")
@one_line
def erased(reference: Reference, json: Json = False) -> None:
    """Every behaviour that is gone from a version, inherited along its parents, with its measures then and now."""
    ledger = open_app().ledger
    model, version = ledger.models.resolve(reference)
    gone = ledger.models.erased(model.name, version.number)
    if json:
        console.print_json({"model": model.name, "version": version.number, "erased": gone})
        return
    rows = []
    for each in gone:
        again = each.recheck
        rows.append([
            each.behaviour.name, each.behaviour.kind, " ".join(map(str, each.behaviour.targets)), each.version,
            each.request, console.when(each.created_at), console.percent(each.samples_in_target),
            console.percent(each.probes_in_target), "" if again is None else console.percent(again.share),
            "" if again is None else f"{_passed(again.passed)} on {again.version}, {console.when(again.created_at)}",
        ])  # fmt: skip
    columns = ["behaviour", "kind", "targets", "version", "request", "at", "samples %", "probes %", "now %", "re-check"]
    if any(each.recipe_origin for each in gone):  # without one the table is wide enough
        columns.append("recipe of")
        rows = [[*row, each.recipe_origin] for row, each in zip(rows, gone, strict=True)]
    count = f"{len(gone)} behaviour{'' if len(gone) == 1 else 's'} gone"
    print_rows(f"{model.name}, version {version.number}: {count}", columns, rows)


@lineage_app.command("recheck", epilog="Example: fsu recheck m@production")
@one_line
def recheck(reference: Reference, by: Who = None, json: Json = False) -> None:
    """Measure the probes of everything that is gone from a version again, on its weights, and keep what they gave.

    Exit code 4 where one of them answers with its target class again.
    """
    from fsu_ray.recheck import recheck as measure

    opened = open_app()
    with console.watching() as watcher:
        model, version, found = measure(opened.ledger, opened.artifacts, reference, by or OPERATOR, watcher.tell)
    passed = all(each.passed for each in found)
    if json:
        document = [{**console.plain(each), "erasure": _short(each.erasure)} for each in found]
        console.print_json({"model": model.name, "version": version.number, "passed": passed, "rechecks": document})
    elif not found:
        console.out.print(f"nothing is gone from {model.name}, version {version.number}", markup=False)
    else:
        rows = [
            [
                each.erasure.behaviour.name, each.erasure.version, each.erasure.request, each.probes,
                console.percent(each.recorded), console.percent(each.share), _passed(each.passed),
            ]
            for each in found
        ]  # fmt: skip
        columns = ["behaviour", "erased in", "request", "probes", "when erased %", "now %", "re-check"]
        print_rows(f"Probes in a target class of {model.name}, version {version.number}", columns, rows)
    if not passed:
        raise typer.Exit(4)


def _passed(passed: bool) -> str:
    return "passed" if passed else "RETURNED"


def _short(erasure: Any) -> dict[str, Any]:
    names = ("id", "version", "request", "behaviour", "probes")
    return {name: console.plain(getattr(erasure, name)) for name in names}


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of a few rows, or else plain lines whose columns stand below each other."""
    if len(rows) <= FEW:
        console.out.print(console.table(title, columns, rows))
        return
    cells = [list(columns), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    lines = [form.format(*row).rstrip() for row in cells]
    sys.stdout.write("\n".join([title, *lines, ""]))
