"""The table of searched recipes. It is empty, so nothing enters the audit chain.

It imports nothing of fsu_ray, so that later changes of the code cannot change what it does.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    moment = sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite")
    op.create_table(
        "searches",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("model_id", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("recipe", sa.JSON),
        sa.Column("recipe_digest", sa.String(64)),
        sa.Column("score", sa.Float),
        sa.Column("evidence", sa.JSON, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("actor", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_searches"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_searches_model_id"),
        sa.CheckConstraint("kind IN ('class', 'subset')", name="kind"),
        sa.CheckConstraint("(recipe IS NULL) = (recipe_digest IS NULL)", name="recipe_digest"),
        sa.CheckConstraint("(recipe IS NULL) = (score IS NULL)", name="score"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_searches_model_id_kind_created_at", "searches", ["model_id", "kind", "created_at"])
    message = "searches is insert-only"
    _refuse("searches_update", "UPDATE ON searches", message)
    _refuse("searches_delete", "DELETE ON searches", message)
    if _on_sqlite():  # whose INSERT OR REPLACE deletes without a DELETE trigger
        taken = "EXISTS (SELECT 1 FROM searches WHERE id = NEW.id)"
        _refuse("searches_replace", "INSERT ON searches", f"{message}: the key is taken", taken)
    else:
        _refuse("searches_truncate", "TRUNCATE ON searches", message, each="STATEMENT")


def _refuse(name: str, moment: str, message: str, when: str = "", each: str = "ROW") -> None:
    if _on_sqlite():
        condition = f" WHEN {when}" if when else ""
        op.execute(f"CREATE TRIGGER {name} BEFORE {moment}{condition} BEGIN SELECT RAISE(ABORT, '{message}'); END")
    else:
        op.execute(f"CREATE TRIGGER {name} BEFORE {moment} FOR EACH {each} EXECUTE FUNCTION fsu_refuse('{message}')")


def _on_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"
