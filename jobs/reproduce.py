"""`ray job submit --working-dir . -- python -m jobs.reproduce table1 --seeds 5`: as `fsu reproduce`."""

from __future__ import annotations

import sys

from fsu_ray.cli import app


def main() -> None:
    """Run `fsu reproduce` with the arguments of this command; it prints one JSON document."""
    app(["reproduce", *sys.argv[1:], "--json"])


if __name__ == "__main__":
    main()
