"""Independent pieces of work as Ray tasks, as many at a time as the cluster has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from fsu_ray.cluster.capacity import autoscaler_limits, cluster_limits
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
    """Yields each item with the result of `function`, in the order in which the tasks end.

    The task of an item takes `resources(item)`, at most `most`. `more(room)` returns at most `room` items that can
    begin, the most urgent first; it is called at the start and after the end of each task. Ray runs tasks in the order
    of submission, so only few wait in Ray; those that wait make an autoscaled cluster grow.

    A task that raises yields RunFailed with the cause, and the others go on. A task whose process dies is retried
    three times. Closing the iterator cancels the tasks under way.
    """
    import ray
    from ray.exceptions import RayError

    task = ray.remote(function)
    pending: dict[Any, Item] = {}
    try:
        while True:
            slots = _slots(most)
            for item in more(max(0, slots + max(1, slots // 2) - len(pending))):
                share = resources(item)
                options = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0), "max_retries": 3}
                pending[task.options(**options).remote(item)] = item
            if not pending:
                return
            (done, *_), _ = ray.wait(list(pending), num_returns=1)
            item = pending.pop(done)
            try:
                yield item, ray.get(done)
            except (FsuError, RayError) as error:
                yield item, RunFailed(cause(error))
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _slots(share: dict[str, float]) -> int:
    """How many tasks that each take `share` the cluster can run at a time once it has grown."""
    limits = cluster_limits(autoscaler_limits())
    return int(min(limits.get(kind, 0) / amount + 1e-6 for kind, amount in share.items()))
