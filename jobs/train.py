"""`ray job submit --working-dir . -- python -m jobs.train --name m --data digits`: train and register a classifier."""

from __future__ import annotations

import argparse
import sys

import fsu_ray
from fsu_ray import console


def main() -> int:
    """Train, register, print the model as JSON; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="the name of the new model")
    parser.add_argument("--data", default="digits", help="digits, mnist, cifar10, an image folder or a Parquet file")
    parser.add_argument(
        "--arch", default="lenet5", help="lenet5, preactresnet18[:WIDTH], resnet50[:WIDTH], torchvision:NAME"
    )
    parser.add_argument("--epochs", type=console.positive, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        with fsu_ray.connect() as fsu, console.watching() as watcher:
            fsu.models.check_name_free(options.name)
            spec, weights = fsu.train(
                options.data, options.arch, options.epochs, options.seed, on_progress=watcher.tell
            )
            model = fsu.models.register(options.name, spec, weights, test_set=options.data)
    except fsu_ray.FsuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    console.print_json(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
