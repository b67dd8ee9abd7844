"""`ray job submit --working-dir . -- python -m jobs.unlearn --max 5`: as `fsu run`.

The ledger, the artifacts and the runs must be reachable from the cluster: set FSU_HOME to a shared folder.
"""

from __future__ import annotations

import sys

from fsu_ray.cli import app


def main() -> None:
    """Run `fsu run` with the arguments of this command; it prints one JSON document."""
    app(["run", *sys.argv[1:], "--json"])


if __name__ == "__main__":
    main()
