"""`fsu alias`, `fsu erased`, `fsu recheck`: what points where, what is erased from it, and whether it still is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Json, ModelName, Who, one_line
from fsu_ray.service import connect

if TYPE_CHECKING:
    from fsu_ray.records import Erasure

alias_app = typer.Typer(help="Aliases: names such as `production` that point to a version.", no_args_is_help=True)
lineage_app = typer.Typer()
"""The commands `erased` and `recheck`, without a group of their own."""

Reference = Annotated[str, typer.Argument(metavar="MODEL[@VERSION|@ALIAS]", help="Without @: the latest version.")]
FEW = 200
"""Up to this many rows are printed as a table, more as plain lines: `rich` takes 0.4 ms a row."""


@alias_app.command("set", epilog="Example: fsu alias set m production 7 --by on-call")
@one_line
def alias_set(
    model: ModelName,
    alias: str,
    version: Annotated[str, typer.Argument(help="A version's number, or another alias that points to it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also to a version that still has an erased behaviour; goes with --reason.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="One word for the record, such as a ticket number.")] = None,
    by: Who = OPERATOR,
    json: Json = False,
) -> None:
    """Point ALIAS of MODEL to VERSION.

    A version that still has a behaviour which another version has lost is refused without --force and --reason.
    """
    move = connect().models.move_alias(model, alias, version, by, force=force, reason=reason)
    if json:
        console.print_json(move)
        return
    before = "" if move.previous is None else f", before to version {move.previous}"
    forced = f" (forced: {move.reason})" if move.forced else ""
    console.out.print(f"{model}@{alias} points to version {move.version}{before}{forced}", markup=False)


@alias_app.command("list", epilog="Example: fsu alias list m")
@one_line
def alias_list(model: ModelName, json: Json = False) -> None:
    """List the aliases of MODEL and the versions they point to."""
    aliases = connect().models.aliases(model)
    if json:
        console.print_json(aliases)
    elif not aliases:
        console.out.print(f"{model} has no aliases; `fsu alias set` makes one", markup=False)
    else:
        rows = [[m.alias, m.version, console.when(m.created_at), m.actor] for m in aliases.values()]
        console.out.print(console.table(f"Aliases of {model}", ["alias", "version", "since", "by"], rows))


@alias_app.command("history", epilog="Example: fsu alias history m")
@one_line
def alias_history(model: ModelName, json: Json = False) -> None:
    """List every move of an alias of MODEL, oldest first."""
    moves = connect().models.alias_moves(model)
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
    """List every behaviour that is erased from a version or from its parents, with its measures then and now."""
    service = connect()
    model, version = service.models.resolve(reference)
    erasures = service.models.erased(model.name, version.number)
    if json:
        console.print_json({"model": model.name, "version": version.number, "erased": erasures})
        return
    rows = []
    for erasure in erasures:
        behaviour, again = erasure.behaviour, erasure.recheck
        rows.append([
            behaviour.name, behaviour.kind, " ".join(map(str, behaviour.targets)), erasure.version,
            erasure.request, console.when(erasure.created_at), console.percent(erasure.samples_in_target),
            console.percent(erasure.probes_in_target), "" if again is None else console.percent(again.share),
            "" if again is None else f"{_passed(again.passed)} on {again.version}, {console.when(again.created_at)}",
        ])  # fmt: skip
    columns = ["behaviour", "kind", "targets", "version", "request", "at", "samples %", "probes %", "now %", "re-check"]
    if any(erasure.recipe_origin for erasure in erasures):
        columns.append("recipe of")
        rows = [[*row, erasure.recipe_origin] for row, erasure in zip(rows, erasures, strict=True)]
    count = f"{len(erasures)} behaviour{'' if len(erasures) == 1 else 's'} erased"
    print_rows(f"{model.name}, version {version.number}: {count}", columns, rows)


@lineage_app.command("recheck", epilog="Example: fsu recheck m@production")
@one_line
def recheck(reference: Reference, by: Who = OPERATOR, json: Json = False) -> None:
    """Measure again whether everything that is erased from a version still is, and record the result.

    The probes of each erasure are measured on the weights of the version. Exit code 4: an erased behaviour has
    returned.
    """
    with console.watching() as watcher:
        model, version, rechecks = connect().models.recheck(reference, by, watcher.tell)
    passed = all(each.passed for each in rechecks)
    if json:
        document = [{**console.plain(each), "erasure": _short(each.erasure)} for each in rechecks]
        console.print_json({"model": model.name, "version": version.number, "passed": passed, "rechecks": document})
    elif not rechecks:
        console.out.print(f"nothing is erased from {model.name}, version {version.number}", markup=False)
    else:
        rows = [
            [
                each.erasure.behaviour.name, each.erasure.version, each.erasure.request, each.probes,
                console.percent(each.recorded), console.percent(each.share), _passed(each.passed),
            ]
            for each in rechecks
        ]  # fmt: skip
        columns = ["behaviour", "erased in", "request", "probes", "when erased %", "now %", "re-check"]
        print_rows(f"Probes in a target class of {model.name}, version {version.number}", columns, rows)
    if not passed:
        raise typer.Exit(4)


def _passed(passed: bool) -> str:
    return "passed" if passed else "RETURNED"


def _short(erasure: Erasure) -> dict[str, Any]:
    names = ("id", "version", "request", "behaviour", "probes")
    return {name: console.plain(getattr(erasure, name)) for name in names}


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print up to `FEW` rows as a table, more as plain lines with aligned columns."""
    if len(rows) <= FEW:
        console.out.print(console.table(title, columns, rows))
        return
    cells = [list(columns), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    lines = [form.format(*row).rstrip() for row in cells]
    sys.stdout.write("\n".join([title, *lines, ""]))
