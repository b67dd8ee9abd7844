"""fsu_ray: batch jobs on Ray that make a classifier forget, with a ledger of what is erased.

`connect()` gives the `Service`, which has every use case. Importing this loads neither Ray nor torch nor SQLAlchemy.
"""

from __future__ import annotations

from fsu_ray.config import Settings, Timings
from fsu_ray.errors import FsuError
from fsu_ray.recipes import Recipe
from fsu_ray.records import (
    AliasMove,
    Behaviour,
    Erasure,
    Generator,
    Model,
    ModelSpec,
    ModelVersion,
    Policy,
    Recheck,
    Request,
    RequestEvent,
    Schedule,
    SearchedRecipe,
    Status,
    Terms,
    Window,
)
from fsu_ray.service import Service, connect
from fsu_ray.work import Outcome, WorkOrder

__all__ = [
    "AliasMove",
    "Behaviour",
    "Erasure",
    "FsuError",
    "Generator",
    "Model",
    "ModelSpec",
    "ModelVersion",
    "Outcome",
    "Policy",
    "Recheck",
    "Recipe",
    "Request",
    "RequestEvent",
    "Schedule",
    "SearchedRecipe",
    "Service",
    "Settings",
    "Status",
    "Terms",
    "Timings",
    "Window",
    "WorkOrder",
    "connect",
]
