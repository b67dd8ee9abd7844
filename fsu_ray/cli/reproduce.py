"""`fsu reproduce`: the paper's tables and figures, on the system's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Cpus, Json, interrupted, one_line
from fsu_ray.errors import UserError

reproduce_app = typer.Typer()


@reproduce_app.command("reproduce", epilog="Example: fsu reproduce table1 --seeds 5")
@one_line
def reproduce(
    name: Annotated[str, typer.Argument(help="A table or figure, or `list` for all of their names.")],
    scale: Annotated[str, typer.Option(help="small: for two cores. paper: the paper's sizes, for GPUs.")] = "small",
    seeds: Annotated[int, typer.Option(min=1, help="How many, side by side where there is room.")] = 5,
    into: Annotated[Path | None, typer.Option(help="A folder. Default: reproduce/ in FSU_HOME.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Compute its cells anew; what they share with others stays.")
    ] = False,
    cpus: Cpus = None,
    per_gpu: Annotated[int, typer.Option(min=1, max=16, help="How many cells share a GPU at a time.")] = 1,
    json: Json = False,
) -> None:
    """Compute a table or figure of the paper, on the system's own parts, and write it as Parquet, Markdown and PNG.

    Each seed is kept as it ends: the same command again goes on where this one was, and with more seeds computes the
    new ones alone. Exit code 1: some of it broke.
    """
    from fsu_ray.experiments.catalogue import NAMES, Scale

    if name == "list":
        if json:
            console.print_json([{"name": each, "what": what} for each, (_, what) in NAMES.items()])
        else:
            console.out.print(console.table("", ["name", "what"], [[each, what] for each, (_, what) in NAMES.items()]))
        return
    if scale not in ("small", "paper"):
        raise UserError(f"--scale is small or paper, not {scale!r}")
    from fsu_ray.config import below, read_settings
    from fsu_ray.experiments import reproduce as runner
    from fsu_ray.storage.artifacts import Artifacts

    settings = read_settings()
    folder = (into or settings.home / "reproduce").resolve()
    store = Artifacts.open(below(settings.artifacts, "reproduce"))

    def on_progress(done: int, of: int, cell: str) -> None:
        console.err.print(f"{done} of {of}: {cell}", markup=False, highlight=False)

    with interrupted("what has ended is kept; the same command again goes on from there"):
        found = runner.reproduce(name, cast(Scale, scale), seeds, folder, store, on_progress, cpus, again, per_gpu)
    files = [str(file) for file in found.files]
    if json:
        rows = [{key: value for key, value in row.items() if not isinstance(value, bytes | list)} for row in found.rows]
        console.print_json({**vars(found), "rows": rows, "files": files})  # pictures and maps are for Parquet
        return
    console.out.print(found.markdown, markup=False, highlight=False, soft_wrap=True)
    kept = found.cells - found.computed
    console.out.print(f"{found.computed} computed now, {kept} found, {found.seconds:.0f} s:")
    for file in files:
        console.out.print(f"  {file}", markup=False, highlight=False, soft_wrap=True)
