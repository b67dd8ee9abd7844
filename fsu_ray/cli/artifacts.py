"""`fsu artifacts`: what lies in the store."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

import typer

from fsu_ray import console
from fsu_ray.cli.shared import OPERATOR, Json, Who, one_line
from fsu_ray.service import connect

artifacts_app = typer.Typer(help="Clear the artifact store.", no_args_is_help=True)


@artifacts_app.command("gc", epilog="Example: fsu artifacts gc --dry-run")
@one_line
def artifacts_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
    older_than: Annotated[
        float, typer.Option(min=0, help="Keep stray artifacts and searches younger than this (hours).")
    ] = 24.0,
    by: Who = OPERATOR,
    json: Json = False,
) -> None:
    """Delete artifacts that nothing refers to, and checkpoints of what is over.

    Deleted are: artifacts that the ledger does not refer to, or has recorded as removed; files that killed writers
    left unfinished; checkpoints of ended requests and of searches. What a running request may have written stays. A
    search whose checkpoints are deleted begins again.
    """
    garbage = connect().retention.collect_garbage(timedelta(hours=older_than), dry_run, by)
    if json:
        console.print_json({"deleted": not dry_run, **asdict(garbage)})
        return
    kinds = {
        "stray": garbage.stray, "recorded as removed": garbage.late, "unfinished": garbage.unfinished,
        "checkpoints": garbage.checkpoints,
    }  # fmt: skip
    for kind, sizes in kinds.items():
        for name, size in sorted(sizes.items()):
            console.out.print(f"{name}  {size:>12,} bytes  {kind}")
    total = [size for sizes in kinds.values() for size in sizes.values()]
    done = "would be deleted" if dry_run else "deleted"
    console.out.print(f"{len(total)} in all, {sum(total):,} bytes: {done}" if total else "nothing to delete")
