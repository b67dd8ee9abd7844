"""Ray tasks: independent pieces of work, as many side by side as the cluster has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from fsu_ray.cluster.growth import reach
from fsu_ray.cluster.workers import cause
from fsu_ray.errors import FsuError, RunFailed

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Item], Result],
    more: Callable[[int], Iterable[Item]],
    resources: Callable[[Item], dict[str, float]],
    most: dict[str, float],
) -> Iterator[tuple[Item, Result | FsuError]]:
    """Each item with what `function` made of it, in the order in which they end; its task takes `resources`,
    none more than `most`.

    `more(room)` gives at most `room` of the items that can begin, the most urgent first: at first, and again after each
    that has ended. Ray takes tasks in the order in which they came, so that it is given few that wait; some do, for a
    cluster that grows by what waits. One that raises yields RunFailed with the cause; the others go on. Whoever stops
    listening ends what is under way. A task whose process died is tried again, three times.
    """
    import ray
    from ray.exceptions import RayError

    task = ray.remote(function)
    waiting: dict[Any, Item] = {}
    try:
        while True:
            slots = _slots(most)
            for item in more(max(0, slots + max(1, slots // 2) - len(waiting))):
                takes = resources(item)
                options = {"num_cpus": takes["CPU"], "num_gpus": takes.get("GPU", 0), "max_retries": 3}
                waiting[task.options(**options).remote(item)] = item
            if not waiting:
                return
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            item = waiting.pop(done)
            try:
                yield item, ray.get(done)
            except (FsuError, RayError) as error:
                yield item, RunFailed(cause(error))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _slots(takes: dict[str, float]) -> int:
    """How many tasks that take as much can run at a time here, and on what the cluster can grow to."""
    most = reach()
    return int(min(most.get(kind, 0) / amount + 1e-6 for kind, amount in takes.items()))
