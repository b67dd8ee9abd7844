"""What a cluster can grow to, from Ray or from the file that `ray up` leaves on the head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fsu_ray.cluster import internals
from fsu_ray.cluster.capacity import autoscaler_limits, cluster_file_limits


def test_limits_of_a_cluster_file() -> None:
    """Types with the most of a resource first, within the limits of each type and of the file; the head is left out."""
    big, small = {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 2}, {"resources": {"CPU": 16}, "max_workers": 4}
    head = {"resources": {"CPU": 99}, "max_workers": 0}
    types = {"head": head, "big": big, "small": small}
    cluster = {"max_workers": 5, "head_node_type": "head", "available_node_types": types}
    assert cluster_file_limits(cluster) == {"CPU": 4 * 16 + 8, "GPU": 8}
    assert cluster_file_limits({**cluster, "max_workers": 1}) == {"CPU": 16, "GPU": 4}
    assert cluster_file_limits({**cluster, "available_node_types": {"head": head}}) == {}


def test_limits_on_the_head_of_a_cluster_of_ray_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Ray if it knows them, else from the file; none without a file or a joined cluster."""
    file = internals.fill_cluster_file(yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(internals, "autoscaler_limits", lambda: None)
    assert autoscaler_limits() == {}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(file))
    assert autoscaler_limits() == {"CPU": 16.0, "GPU": 4.0}
    monkeypatch.delenv("RAY_ADDRESS")
    assert autoscaler_limits() == {}
    monkeypatch.setattr(internals, "autoscaler_limits", lambda: {"GPU": 2})
    assert autoscaler_limits() == {"GPU": 2.0}
