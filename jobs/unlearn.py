"""`ray job submit --working-dir . -- python -m jobs.unlearn --max 5`: carry out what is queued, as `fsu run`.

The ledger, the artifacts and the runs must be reachable from the cluster: set FSU_HOME to a shared folder.
"""

from __future__ import annotations

import argparse
import sys

from fsu_ray import console
from fsu_ray.app import App
from fsu_ray.errors import FsuError
from fsu_ray.pipeline import WorkerOptions


def main() -> int:
    """Run and print one JSON document; 0 all succeeded, 1 one failed, 4 one was rejected, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="only requests of this model")
    parser.add_argument("--max", type=console.positive, dest="max_requests", help="end after this many requests")
    parser.add_argument("--coalesce", action="store_true", help="erase all class requests of a model in one run")
    parser.add_argument("--workers", type=console.positive, help="that share each run; default: FSU_WORKERS, or one")
    options = parser.parse_args()
    try:
        app = App.open()
        app.reconcile()
        with console.watching() as watcher, app.on_ray(watcher.tell, number=options.workers) as execute:
            results = app.run(execute, WorkerOptions(options.max_requests, options.model, coalesce=options.coalesce))
    except FsuError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted: {console.REQUEUED}", file=sys.stderr)
        return 130
    console.print_json(console.results_json(results))
    return console.exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
