"""What a model line wants done besides its erasures, and who may say so."""

from __future__ import annotations

import re

import sqlalchemy as sa

from fsu_ray.errors import UserError
from fsu_ray.records import ACTOR, Model, Policy
from fsu_ray.records import OPERATOR as OPERATOR
from fsu_ray.storage.schema import model_policies

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:#/-]{0,99}")


def check_actor(actor: str) -> str:
    """`actor` if it is an opaque id; raises UserError: the ledger holds no e-mail addresses and no full names."""
    if not re.fullmatch(ACTOR, actor):
        raise UserError(f"{actor!r} is no opaque id: use up to 100 letters, digits and _ . : / - (no e-mail address)")
    return actor


def check_word(word: str) -> str:
    """`word` if it is one, such as the number of a ticket; raises UserError: history holds no free text."""
    if not _WORD.fullmatch(word):
        raise UserError(f"{word!r} is no reason that history can keep: give one word, such as the number of a ticket")
    return word


def fetch_policy(connection: sa.Connection, model: Model) -> Policy:
    """The policy of a model that is in force: the last one that was set, else the default."""
    newest = (
        sa.select(model_policies.c.policy)
        .where(model_policies.c.model_id == model.id)
        .order_by(model_policies.c.created_at.desc(), model_policies.c.id.desc())
        .limit(1)
    )
    kept = connection.execute(newest).scalar_one_or_none()
    return Policy() if kept is None else Policy.model_validate(kept)
