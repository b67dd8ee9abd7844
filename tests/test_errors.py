"""Errors cross Ray processes: all of them survive pickling, and each has an exit code."""

from __future__ import annotations

import pickle

from fsu_ray import errors


def subclasses(kind: type[errors.FsuError]) -> list[type[errors.FsuError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in subclasses(child))]


def test_every_error_survives_pickling() -> None:
    """Type, message and exit code are the same on the other side; users' mistakes end with 2."""
    for kind in subclasses(errors.FsuError):
        back = pickle.loads(pickle.dumps(kind("what to do")))
        assert (type(back), str(back), back.exit_code) == (kind, "what to do", kind.exit_code)
        assert (kind.exit_code == 2) or not issubclass(kind, errors.UserError)
