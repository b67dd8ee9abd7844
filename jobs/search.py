"""`ray job submit --working-dir . -- python -m jobs.search --model m --request r-19`: as `fsu search`."""

from __future__ import annotations

import sys

from fsu_ray.cli import app


def main() -> None:
    """Run `fsu search` with the arguments of this command; it prints one JSON document."""
    app(["search", *sys.argv[1:], "--json"])


if __name__ == "__main__":
    main()
