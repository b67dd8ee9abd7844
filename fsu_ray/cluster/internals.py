"""Ray's private names, used in this module alone, and Ray's errors that only their text tells apart.

Written for Ray 2.60. Another minor version may rename or change any of this without notice, so the ways into Ray
(`workers.connect`, `jobs.JobsClient`, `template.findings`) call `check_version` first.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from fsu_ray.errors import UserError

VERSION = "2.60"
"""The minor version of Ray that this module was written for."""


class RequestRefused(RuntimeError):
    """A head answered a request to its Jobs API with an HTTP status that is not 200."""

    status = 0


def check_version(installed: str | None = None) -> None:
    """Raise UserError unless the installed Ray is of the minor version that this module was written for."""
    installed = installed or metadata.version("ray")
    if installed.split(".")[:2] != VERSION.split("."):
        raise UserError(
            f"fsu_ray uses internals of Ray {VERSION}, and Ray {installed} is installed: "
            f"pip install 'ray[default,train,tune]=={VERSION}.*'"
        )


def autoscaler_limits() -> dict[str, float] | None:
    """The most of each resource that the autoscaler may start, None where Ray knows of no limits.

    Ray must be connected. Ray has no public function for this.
    """
    from ray._private.state import state

    limits: dict[str, float] | None = state.get_max_resources_from_cluster_config()
    return limits


def fill_cluster_file(written: Mapping[str, Any]) -> dict[str, Any]:
    """A file for `ray up` with Ray's defaults filled in, after Ray's own validation; raises whatever Ray raises.

    Ray offers both only as part of `ray up`, which starts nodes.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled: dict[str, Any] = prepare_config(written)
    validate_config(filled)
    return filled


def start_autoscaling_coordinator() -> None:
    """Start the actor that the controller of a Ray Train run would start, and wait for, once it has loaded."""
    with suppress(ImportError):
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

        coordinator.get_or_create_autoscaling_coordinator()


def checkpoint_list(run: Path) -> Path:
    """The file in the folder of a Ray Train run that lists the checkpoints from which Ray would resume it.

    Ray names it in a private constant; its public functions read it only from inside a run.
    """
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    return run / str(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)


def jobs_client(address: str | None, timeout: tuple[float, float]) -> Any:
    """Ray's client of the Jobs API with three changes.

    A request has a time limit: seconds to connect and to answer. A refusal is a RequestRefused with its HTTP status,
    where Ray raises a RuntimeError with the status in its text. Folders are uploaded as compressed zip files; Ray
    stores them uncompressed, which is 1 MB for fsu_ray.
    """
    from ray._private.runtime_env.packaging import create_package
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *words: Any, **options: Any) -> Any:
            return super()._do_request(*words, **{"timeout": timeout, **options})

        def _raise_error(self, response: Any) -> None:
            error = RequestRefused(response.text)
            error.status = response.status_code
            raise error

        def _upload_package(
            self, uri: str, path: str, include_gitignore: bool, is_file: bool = False, **options: Any
        ) -> None:
            if is_file:
                super()._upload_package(uri, path, include_gitignore, is_file=True)
                return
            with tempfile.TemporaryDirectory() as folder:
                package = Path(folder) / "package.zip"
                create_package(path, package, include_gitignore=include_gitignore, **options)
                super()._upload_package(uri, str(_compressed(package)), include_gitignore, is_file=True)

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they report each upload
    return Client(address)


def _compressed(package: Path) -> Path:
    """The same zip file, compressed, beside the original."""
    target = package.with_name(f"compressed-{package.name}")
    with ZipFile(package) as source, ZipFile(target, "w", ZIP_DEFLATED) as copy:
        for entry in source.infolist():
            copy.writestr(entry, source.read(entry), ZIP_DEFLATED)
    return target


def session_name(client: Any) -> str:
    """The name of the session of the head that `client` talks to. The public client does not return it."""
    return str(client._do_request("GET", "/api/version").json()["session_name"])


def is_wrong_token(error: Exception) -> bool:
    """Whether an AuthenticationError means a wrong token (HTTP 403) rather than a missing one (401).

    The error holds its text alone: "Authentication failed: ..." or "Authentication required: ...".
    """
    return str(error).startswith("Authentication failed")


def lacks_agent(error: RequestRefused) -> bool:
    """Whether a head refused a job because the agent that starts jobs is not there yet.

    The head answers 500 to this as to any other failure; only the text tells.
    """
    return "No available agent" in str(error)


def job_metadata() -> Mapping[str, Any]:
    """The metadata of the Ray job whose driver this process is, {} where it is no driver of a job.

    Ray passes it in an environment variable; its public runtime context gives it only after `ray.init`.
    """
    try:
        known = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    except (json.JSONDecodeError, AttributeError):
        return {}
    return known if isinstance(known, dict) else {}
