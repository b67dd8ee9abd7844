"""What a cluster can grow to, by the file that `ray up` leaves on the head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fsu_ray.cluster.growth import growth, most


def test_the_bounds_of_a_cluster_file() -> None:
    """Types with the most of a resource first, up to the bounds of each type and of all; the head does not grow."""
    big, small = {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 2}, {"resources": {"CPU": 16}, "max_workers": 4}
    head = {"resources": {"CPU": 99}, "max_workers": 0}
    types = {"head": head, "big": big, "small": small}
    cluster = {"max_workers": 5, "head_node_type": "head", "available_node_types": types}
    assert most(cluster) == {"CPU": 4 * 16 + 8, "GPU": 8}
    assert most({**cluster, "max_workers": 1}) == {"CPU": 16, "GPU": 4}
    assert most({**cluster, "available_node_types": {"head": head}}) == {}


def test_a_driver_on_a_head_of_ray_up_knows_what_may_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray where it knows, else by the file; nothing where no cluster was joined, or there is no file."""
    from ray._private.state import state
    from ray.autoscaler._private.util import prepare_config

    file = prepare_config(yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    assert growth() == {}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(file))
    assert growth() == {"CPU": 16.0, "GPU": 4.0}
    monkeypatch.delenv("RAY_ADDRESS")
    assert growth() == {}
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"GPU": 2})
    assert growth() == {"GPU": 2.0}
