"""How much of each resource (CPU, GPU, ...) a cluster has, and how much it can grow to.

An autoscaled cluster may have no GPU until a run asks for one. Ray knows the limits of some autoscalers; for a cluster
of `ray up` they are read from the file that `ray up` leaves on the head, where the drivers of jobs run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsu_ray.cluster import internals

BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
"""The cluster file on the head of a cluster of `ray up`: JSON, with all defaults filled in."""


def autoscaler_limits() -> dict[str, float]:
    """How much of each resource the nodes that the autoscaler may start have in total; {} without an autoscaler.

    Ray must be connected. The file of `ray up` counts only in a process that has joined a cluster (RAY_ADDRESS).
    """
    limits = internals.autoscaler_limits()
    file = Path(BOOTSTRAP_FILE).expanduser()
    if limits is None and os.environ.get("RAY_ADDRESS") and file.is_file():
        limits = cluster_file_limits(json.loads(file.read_text()))
    return {resource: float(amount) for resource, amount in (limits or {}).items()}


def cluster_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """How much of each resource the cluster has or can grow to, whichever is more. Ray must be connected.

    `limits`: what `autoscaler_limits` returns.
    """
    import ray

    present = ray.cluster_resources()
    return {name: max(present.get(name, 0.0), limits.get(name, 0.0)) for name in {*present, *limits}}


def cluster_file_limits(cluster: Mapping[str, Any]) -> dict[str, float]:
    """How much of each resource all workers of a cluster file with defaults filled in have in total.

    For each resource, the node types with most of it are started first, within the limits of the type and of the file.
    """
    types = [node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    limits = {}
    for resource in {resource for node in types for resource in node["resources"]}:
        left, total = cluster["max_workers"], 0.0
        for amount, number in sorted(
            ((node["resources"].get(resource, 0), node["max_workers"]) for node in types), reverse=True
        ):
            total += amount * min(left, number)
            left -= min(left, number)
        limits[resource] = total
    return limits
