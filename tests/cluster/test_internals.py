"""Ray's private names: the version they belong to, and that no other module uses them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from fsu_ray.cluster import internals, template, workers
from fsu_ray.cluster.jobs import JobsClient
from fsu_ray.errors import UserError

PACKAGE = Path(internals.__file__).parent.parent
PRIVATE = re.compile(r"ray\.[a-z0-9_.]*_(internal|private)|_create_default|ray\._")


def test_one_module_uses_private_names() -> None:
    """The same pattern as `git grep -nE` in the issue that asked for it."""
    files = [file for file in PACKAGE.rglob("*.py") if PRIVATE.search(file.read_text())]
    assert [file.relative_to(PACKAGE).as_posix() for file in files] == ["cluster/internals.py"]


@pytest.mark.parametrize("version", ["2.60.0", "2.60.1", "2.60.0rc1"])
def test_the_version_it_was_written_for(version: str) -> None:
    internals.check_version(version)


@pytest.mark.parametrize("version", ["2.59.1", "2.61.0", "3.0.0.dev0", "2.6.0", "2"])
def test_another_version_is_refused_with_the_command_that_installs_the_right_one(version: str) -> None:
    with pytest.raises(UserError, match=rf"Ray {version} is installed: pip install 'ray\[.*\]==2\.60\.\*'"):
        internals.check_version(version)


@pytest.mark.parametrize("enter", [workers.connect, JobsClient, lambda: template.findings("", [])])
def test_every_way_into_ray_checks_the_version(enter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "VERSION", "2.1")
    with pytest.raises(UserError, match=r"uses internals of Ray 2\.1,"):
        enter()


def test_a_refusal_has_its_status_and_a_wrong_token_is_not_a_missing_one() -> None:
    """As Ray's client builds its errors from the answer of a head."""
    from ray._private.authentication.http_token_authentication import format_authentication_http_error

    wrong, missing = (
        AuthenticationError(format_authentication_http_error(status, "Forbidden") or "") for status in (403, 401)
    )
    assert (internals.is_wrong_token(wrong), internals.is_wrong_token(missing)) == (True, False)


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '{"metadata": null}', '{"metadata": [1]}'])
def test_a_process_that_is_no_driver_of_a_job(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", text)
    assert internals.job_metadata() == {}
