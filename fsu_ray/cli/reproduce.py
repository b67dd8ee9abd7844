"""`fsu reproduce`: the paper's tables and figures, computed by fsu_ray itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from fsu_ray import console
from fsu_ray.cli.shared import Cpus, Json, interrupted, one_line
from fsu_ray.errors import UserError
from fsu_ray.service import Service

reproduce_app = typer.Typer()


@reproduce_app.command("reproduce", epilog="Example: fsu reproduce table1 --seeds 5")
@one_line
def reproduce(
    name: Annotated[str, typer.Argument(help="A table or figure; `list` prints their names.")],
    scale: Annotated[str, typer.Option(help="small: for two cores. paper: the paper's sizes, for GPUs.")] = "small",
    seeds: Annotated[int, typer.Option(min=1, help="How many repetitions; they run side by side where they fit.")] = 5,
    into: Annotated[Path | None, typer.Option(help="The folder for results. Default: reproduce/ in FSU_HOME.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Compute its cells anew; cells that other tables need too stay.")
    ] = False,
    cpus: Cpus = None,
    per_gpu: Annotated[int, typer.Option(min=1, max=16, help="How many cells share a GPU at a time.")] = 1,
    json: Json = False,
) -> None:
    """Compute a table or figure of the paper, and write it as Parquet, Markdown and PNG.

    Each seed is kept when it ends: the same command again computes only what is missing. Exit code 1: some of it
    broke.
    """
    from fsu_ray.experiments.catalogue import NAMES

    if name == "list":
        if json:
            console.print_json([{"name": each, "what": what} for each, (_, what) in NAMES.items()])
        else:
            console.out.print(console.table("", ["name", "what"], [[each, what] for each, (_, what) in NAMES.items()]))
        return
    if scale not in ("small", "paper"):
        raise UserError(f"--scale is small or paper, not {scale!r}")
    size = cast(Literal["small", "paper"], scale)

    def on_cell(done: int, total: int, cell: str) -> None:
        console.err.print(f"{done} of {total}: {cell}", markup=False, highlight=False)

    with interrupted("what has ended is kept; the same command continues from there"):
        result = Service().reproduce(name, size, seeds, into, again=again, cpus=cpus, per_gpu=per_gpu, on_cell=on_cell)
    files = [str(file) for file in result.files]
    if json:
        rows = [{k: v for k, v in row.items() if not isinstance(v, bytes | list)} for row in result.rows]
        console.print_json({**vars(result), "rows": rows, "files": files})  # pictures and maps are for Parquet
        return
    console.out.print(result.markdown, markup=False, highlight=False, soft_wrap=True)
    kept = result.cells - result.computed
    console.out.print(f"{result.computed} computed now, {kept} kept from before, {result.seconds:.0f} s:")
    for file in files:
        console.out.print(f"  {file}", markup=False, highlight=False, soft_wrap=True)
