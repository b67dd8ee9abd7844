"""What a cluster can grow to: its autoscaler starts nodes when they are asked for, so that at first there are none.

Ray has a word for it (`get_max_resources_from_cluster_config`), but what `ray up` makes does not fill it in. It leaves
its file on the head though, where the drivers of jobs run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts its file, as JSON, with all defaults filled in."""


def growth() -> dict[str, float]:
    """How much of each resource the nodes that the autoscaler may start have in all; {} where there is none.

    Asked of Ray, which must be connected; else of the file of `ray up`, by a process that joined a cluster.
    """
    from ray._private.state import state

    known = state.get_max_resources_from_cluster_config()
    file = Path(FILE).expanduser()
    if known is None and os.environ.get("RAY_ADDRESS") and file.is_file():
        known = most(json.loads(file.read_text()))
    return {kind: float(amount) for kind, amount in (known or {}).items()}


def reach() -> dict[str, float]:
    """How much of each resource the cluster has or can grow to, whichever is more. Ray must be connected."""
    import ray

    now, later = ray.cluster_resources(), growth()
    return {kind: max(now.get(kind, 0.0), later.get(kind, 0.0)) for kind in {*now, *later}}


def most(cluster: Mapping[str, Any]) -> dict[str, float]:
    """What all workers of a cluster file, defaults filled in, have in all, its bounds kept."""
    types = [kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    found = {}
    for resource in {resource for kind in types for resource in kind["resources"]}:
        left, total = cluster["max_workers"], 0.0
        for amount, number in sorted(
            ((k["resources"].get(resource, 0), k["max_workers"]) for k in types), reverse=True
        ):
            total += amount * min(left, number)
            left -= min(left, number)
        found[resource] = total
    return found
