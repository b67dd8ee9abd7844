"""`FSU_DATA=... python -m jobs.measure class9 --seeds 3`: scenarios of `experiments.mnist`, a JSON line a request."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from fsu_ray import console
from fsu_ray.errors import FsuError
from fsu_ray.service import connect


def main() -> int:
    """Run the scenarios and print their rows; 0, or the error's exit code."""
    from fsu_ray.experiments.mnist import SCENARIOS, read_bench, scenario

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="+", choices=list(SCENARIOS))
    parser.add_argument("--arch", default="lenet5")
    parser.add_argument("--epochs", type=int, default=6, help="of the classifier")
    parser.add_argument("--seeds", type=int, default=1, help="how many, each with a classifier and samples of its own")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="a recipe's value, KEY=VALUE")
    options = parser.parse_args()
    try:
        service = connect()
        recipe = service.recipes.preset(options.recipe, options.changes)
        bench = read_bench(Path(os.environ.get("FSU_DATA", ".")))
        with console.watching() as watcher, service.on_ray(watcher.tell) as execute:
            for name in options.scenarios:
                for seed in range(options.first_seed, options.first_seed + options.seeds):
                    arguments = (bench, name, options.arch, options.epochs, seed, recipe, console.err.print)
                    for row in scenario(service.ledger, service.artifacts, execute, *arguments):
                        print(json.dumps(row), flush=True)
    except FsuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
