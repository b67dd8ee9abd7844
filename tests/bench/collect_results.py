"""Copy tables and pictures of `fsu reproduce` to fsu_ray/experiments/results, and keep the notes there.

    python -m tests.bench.collect_results .fsu/reproduce [table1 figure3 ...]

Takes NAME.md and its pictures from `small/` to results/ and from `paper/` to results/paper/; without names, all.
A results file's notes (`markdown.NOTES`) stay below the new table. Read them again: their figures may be old.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from fsu_ray.experiments.catalogue import NAMES
from fsu_ray.experiments.markdown import write_above_notes

RESULTS = Path(__file__).parents[2] / "fsu_ray" / "experiments" / "results"


def collect(source: Path, target: Path, names: list[str]) -> list[Path]:
    """Copy the Markdown files and pictures of `names` from the folder of `fsu reproduce`; the files written."""
    written = []
    for scale, folder in (("small", target), ("paper", target / "paper")):
        for name in names:
            for file in sorted((source / scale).glob(f"{name}.*")):
                copy = folder / file.name
                folder.mkdir(parents=True, exist_ok=True)
                if file.suffix == ".md":
                    write_above_notes(copy, file.read_text())
                elif file.suffix == ".png":
                    shutil.copyfile(file, copy)
                else:
                    continue
                written.append(copy)
    return written


def main() -> None:
    """Copy and print the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder that `fsu reproduce` writes to")
    parser.add_argument("names", nargs="*", help="tables and figures; default: all")
    options = parser.parse_args()
    for file in collect(options.source, RESULTS, options.names or list(NAMES)):
        print(file)


if __name__ == "__main__":
    main()
