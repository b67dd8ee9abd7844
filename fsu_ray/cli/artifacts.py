"""`fsu artifacts`: what lies in the store."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Json, Who, one_line, open_app

artifacts_app = typer.Typer(help="Artifacts: what lies in the store.", no_args_is_help=True)


@artifacts_app.command("gc", epilog="Example: fsu artifacts gc --dry-run")
@one_line
def artifacts_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    older_than: Annotated[
        float, typer.Option(min=0, help="Hours that a stray artifact, or a search, must be old.")
    ] = 24.0,
    by: Who = None,
    json: Json = False,
) -> None:
    """Delete artifacts that the ledger does not refer to, those that it has on record as removed, what writers that
    were killed have left, and the checkpoints of requests that have ended and of searches.

    What may be the work of a running request is left alone. A search whose checkpoints are gone begins again.
    """
    from fsu_ray.retention import collect, garbage
    from fsu_ray.storage.checkpoints import Checkpoints

    opened = open_app()
    runs = Checkpoints(opened.settings.runs)
    found = garbage(opened.ledger, opened.artifacts, runs, timedelta(hours=older_than))
    if not dry_run:
        collect(opened.ledger, opened.artifacts, runs, found, by or OPERATOR)
    if json:
        console.print_json({"deleted": not dry_run, **asdict(found)})
        return
    kinds = {
        "stray": found.stray, "recorded as removed": found.late, "unfinished": found.unfinished,
        "checkpoints": found.checkpoints,
    }  # fmt: skip
    for what, names in kinds.items():
        for name, size in sorted(names.items()):
            console.out.print(f"{name}  {size:>12,} bytes  {what}")
    sizes = [size for names in kinds.values() for size in names.values()]
    said = "would be deleted" if dry_run else "deleted"
    console.out.print(f"{len(sizes)} in all, {sum(sizes):,} bytes: {said}" if sizes else "nothing to delete")
