"""Alembic's entry point for every command: runs the migrations on the connection and transaction of the caller.

To make a new revision: `alembic.command.revision(config, message, autogenerate=True)` with the configuration that
`storage.database` builds and an open connection in `config.attributes["connection"]`.
"""

from __future__ import annotations

from alembic import context

from fsu_ray.storage import columns, schema, triggers  # noqa: F401

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=columns.metadata,
    version_table=schema.VERSION_TABLE,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
