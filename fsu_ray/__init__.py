"""fsu_ray: batch jobs on Ray that make a classifier forget, with a ledger of what is gone.

Importing this loads neither Ray nor torch.
"""

from __future__ import annotations

from fsu_ray.errors import FsuError
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Erasure, Generator, Model, ModelSpec, ModelVersion, Request, Status
from fsu_ray.work import Outcome, WorkOrder

__all__ = [
    "Behaviour",
    "Erasure",
    "FsuError",
    "Generator",
    "Model",
    "ModelSpec",
    "ModelVersion",
    "Outcome",
    "Recipe",
    "Request",
    "Status",
    "WorkOrder",
]
