"""The ledger's tables in their present form. `migrations` brings a database there, `triggers` guards the tables.

Invariants are constraints: one running request a model and one live request an idempotency key (partial unique
indexes), one erasure a request, one firing a window, no cascade into history. All tables except `requests`,
`schedule_windows` and `audit_pending` are insert-only.
"""

from __future__ import annotations

import sqlalchemy as sa

from fsu_ray.records import Status
from fsu_ray.storage.columns import (
    Instant,
    audit_columns,
    digest,
    foreign_key,
    in_list,
    json,
    key,
    moment,
    table,
    unique_where,
    version_foreign_key,
)

REVISION = "0005"
"""The revision in `migrations` that these tables describe."""

VERSION_TABLE = "fsu_revision"
"""Alembic's table of the revision. With a name of our own, no other program's table is mistaken for it."""

TERMINAL = tuple(status.value for status in Status if status.is_terminal)
LIVE = tuple(status.value for status in Status if not status.is_terminal)

models = table(
    "models",
    key(),
    sa.Column("name", sa.String(100), nullable=False, unique=True),
    json("spec"),
    sa.Column("test_set", sa.Text),
    moment("created_at"),
)

model_policies = table(
    "model_policies",
    key(),
    foreign_key("model_id", "models.id"),
    json("policy"),
    *audit_columns(),
    sa.Index("ix_model_policies_model_id_created_at", "model_id", "created_at"),
)

requests = table(
    "requests",
    key(),
    foreign_key("model_id", "models.id"),
    sa.Column("behaviour_name", sa.String(100), nullable=False),
    sa.Column("behaviour_kind", sa.String(10), nullable=False),
    json("behaviour_targets"),
    digest("samples"),
    sa.Column("sample_count", sa.Integer, nullable=False),
    json("recipe"),
    sa.Column("idempotency_key", sa.String(64), nullable=False),
    moment("submitted_at"),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("worker", sa.String(200)),
    moment("lease_until", nullable=True),
    sa.Column("reason", sa.Text),
    sa.Column("version", sa.Integer),
    json("report", nullable=True),
    moment("started_at", nullable=True),
    moment("finished_at", nullable=True),
    # From here on: revision 0002.
    sa.Column("key_given", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    moment("not_before", nullable=True),
    moment("due_at", nullable=True),
    sa.Column("requested_by", sa.String(100)),
    sa.Column("lead", sa.String(40)),  # the leader of its batch, NULL for the leader itself
    sa.Column(
        "alone", sa.Boolean, nullable=False, server_default=sa.false()
    ),  # never in a batch: the gate refused one with it
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    moment("retry_at", nullable=True),
    sa.Column("cancel_by", sa.String(100)),
    sa.Column("changes", sa.Integer, nullable=False, server_default="0"),
    moment("changed_at", nullable=True),
    sa.Column("changed_by", sa.String(200)),
    # The generator that the request names (revision 0005). No foreign key, since generators refer to requests.
    sa.Column("generator_id", sa.String(40)),
    sa.CheckConstraint(in_list("status", tuple(status.value for status in Status)), name="status"),
    sa.CheckConstraint(in_list("behaviour_kind", ("class", "subset")), name="kind"),
    sa.CheckConstraint("sample_count >= 1", name="sample_count"),
    sa.CheckConstraint("attempt >= 0", name="attempt"),
    sa.CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="lease"),
    sa.CheckConstraint("status <> 'running' OR worker IS NOT NULL", name="worker"),
    sa.CheckConstraint("(status = 'succeeded') = (version IS NOT NULL)", name="version"),
    sa.CheckConstraint(f"({in_list('status', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished"),
    sa.Index(
        "ix_requests_queue",
        sa.text("priority DESC"),
        "submitted_at",
        "id",
        sqlite_where=sa.text("status = 'queued'"),
        postgresql_where=sa.text("status = 'queued'"),
    ),
    sa.Index("ix_requests_model_id_submitted_at", "model_id", "submitted_at"),
    sa.Index(
        "ix_requests_lead",
        "lead",
        sqlite_where=sa.text("lead IS NOT NULL"),
        postgresql_where=sa.text("lead IS NOT NULL"),
    ),
    # The requests of a batch are all running; the leader stands for them.
    unique_where("uq_requests_running", ("model_id",), "status = 'running' AND lead IS NULL"),
    unique_where("uq_requests_live_key", ("model_id", "idempotency_key"), in_list("status", LIVE)),
    unique_where("uq_requests_given_key", ("model_id", "idempotency_key"), "key_given"),
)

TERMS = (
    "id", "model_id", "behaviour_name", "behaviour_kind", "behaviour_targets", "samples", "sample_count", "recipe",
    "idempotency_key", "submitted_at", "key_given", "priority", "not_before", "due_at", "requested_by", "generator_id",
)  # fmt: skip
"""The columns of a request that never change."""

LATER = {"requests": ("generator_id",), "generators": ("transferred_from",)}
"""Columns that were added to a table after the audit chain had recorded rows of it. Such a row must have NULL there."""

request_events = table(
    "request_events",
    sa.Column("request_id", sa.ForeignKey("requests.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("old", sa.String(20)),
    sa.Column("new", sa.String(20), nullable=False),
    moment("at"),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("reason", sa.Text),
)

audit_pending = table(  # steps of requests that are not in the audit chain yet
    "audit_pending",
    sa.Column("request_id", sa.ForeignKey("requests.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
)

model_versions = table(
    "model_versions",
    key(),
    foreign_key("model_id", "models.id"),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("parent", sa.Integer),
    sa.Column("root", sa.Integer, nullable=False),
    digest("weights"),
    foreign_key("request_id", "requests.id", nullable=True, unique=True),
    moment("created_at"),
    sa.UniqueConstraint("model_id", "number"),
    version_foreign_key("parent"),
    version_foreign_key("root"),
    sa.CheckConstraint("(number = 1) = (parent IS NULL)", name="first"),
    sa.CheckConstraint("parent >= 1 AND parent < number", name="parent"),
    sa.CheckConstraint("root >= 1 AND root <= number", name="root"),
)

generators = table(
    "generators",
    key(),
    foreign_key("model_id", "models.id"),
    sa.Column("root", sa.Integer, nullable=False),
    json("spec"),
    digest("recipe_digest"),
    digest("weights"),
    digest("dataset"),
    sa.Column("origin", sa.String(20), nullable=False),
    foreign_key("warm_started_from", "generators.id", nullable=True),
    foreign_key("transferred_from", "generators.id", nullable=True),
    json("figures"),
    foreign_key("request_id", "requests.id", nullable=True, unique=True),
    moment("created_at"),
    version_foreign_key("root"),
    sa.CheckConstraint(in_list("origin", ("trained", "warm_started", "transferred", "imported")), name="origin"),
    sa.CheckConstraint("(origin = 'imported') = (request_id IS NULL)", name="request_id"),
    sa.CheckConstraint("(origin = 'transferred') = (transferred_from IS NOT NULL)", name="transferred_from"),
    sa.CheckConstraint("(origin = 'warm_started') = (warm_started_from IS NOT NULL)", name="warm_started_from"),
    sa.Index("ix_generators_model_id_created_at", "model_id", "created_at"),
)

erasures = table(
    "erasures",
    key(),
    foreign_key("model_id", "models.id"),
    sa.Column("version", sa.Integer, nullable=False),
    foreign_key("request_id", "requests.id", unique=True),
    sa.Column("behaviour_name", sa.String(100), nullable=False),
    sa.Column("behaviour_kind", sa.String(10), nullable=False),
    json("behaviour_targets"),
    digest("samples"),
    digest("mask"),
    digest("probes"),
    foreign_key("generator_id", "generators.id"),
    sa.Column("generator_use", sa.String(20), nullable=False),
    json("report"),
    moment("created_at"),
    version_foreign_key("version"),
    sa.CheckConstraint(in_list("behaviour_kind", ("class", "subset")), name="kind"),
    sa.CheckConstraint(
        in_list("generator_use", ("trained", "reused", "warm_started", "transferred")), name="generator_use"
    ),
    sa.Index("ix_erasures_model_id_version", "model_id", "version"),
)

aliases_history = table(
    "aliases_history",
    key(),
    foreign_key("model_id", "models.id"),
    sa.Column("alias", sa.String(50), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("previous", sa.Integer),
    sa.Column("forced", sa.Boolean, nullable=False),
    sa.Column("reason", sa.String(100)),
    *audit_columns(),
    version_foreign_key("version"),
    sa.Index("ix_aliases_history_model_id_alias_created_at", "model_id", "alias", "created_at"),
)

rechecks = table(
    "rechecks",
    key(),
    foreign_key("erasure_id", "erasures.id"),
    foreign_key("model_id", "models.id"),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("probes", sa.Integer, nullable=False),
    sa.Column("share", sa.Float),
    sa.Column("passed", sa.Boolean, nullable=False),
    *audit_columns(),
    version_foreign_key("version"),
    sa.Index("ix_rechecks_erasure_id_created_at", "erasure_id", "created_at"),
)

generator_retirements = table(
    "generator_retirements",
    key(),
    foreign_key("generator_id", "generators.id", unique=True),
    sa.Column("reason", sa.String(20), nullable=False),
    *audit_columns(),
    sa.CheckConstraint(in_list("reason", ("operator", "erasure", "age", "seal")), name="reason"),
)

seals = table(
    "seals",
    key(),
    foreign_key("generator_id", "generators.id", unique=True),
    foreign_key("model_id", "models.id"),
    sa.Column("version", sa.Integer, nullable=False),
    digest("dataset"),
    *audit_columns(),
    version_foreign_key("version"),
    sa.UniqueConstraint("model_id", "version"),
)

removals = table(
    "removals",
    key(),
    digest("digest"),
    sa.Column("reason", sa.String(20), nullable=False),
    foreign_key("request_id", "requests.id", nullable=True),
    foreign_key("generator_id", "generators.id", nullable=True),
    *audit_columns(),
    sa.CheckConstraint(in_list("reason", ("purged", "retired", "sealed", "unreferenced")), name="reason"),
    sa.Index("ix_removals_digest", "digest"),
    sa.Index("ix_removals_request_id", "request_id"),
)

schedules = table(
    "schedules",
    key(),
    foreign_key("model_id", "models.id"),
    sa.Column("cron", sa.String(100), nullable=False),
    sa.Column("timezone", sa.String(64), nullable=False),
    sa.Column("max_requests", sa.Integer),
    sa.Column("minutes", sa.Integer),
    *audit_columns(),
    sa.CheckConstraint("max_requests >= 1", name="max_requests"),
    sa.CheckConstraint("minutes >= 1", name="minutes"),
)

schedule_events = table(
    "schedule_events",
    key(),
    foreign_key("schedule_id", "schedules.id"),
    sa.Column("state", sa.String(10), nullable=False),
    *audit_columns(),
    sa.CheckConstraint(in_list("state", ("active", "paused", "removed")), name="state"),
    sa.Index("ix_schedule_events_schedule_id_created_at", "schedule_id", "created_at"),
)

schedule_windows = table(
    "schedule_windows",
    sa.Column("schedule_id", sa.ForeignKey("schedules.id"), primary_key=True),
    sa.Column("starts_at", Instant, primary_key=True),
    sa.Column("missed", sa.Integer, nullable=False),
    moment("fired_at"),
    sa.Column("worker", sa.String(200), nullable=False),
    moment("lease_until", nullable=True),
    moment("finished_at", nullable=True),
    sa.Column("requests", sa.Integer, nullable=False, server_default="0"),
    sa.CheckConstraint("(lease_until IS NULL) = (finished_at IS NOT NULL)", name="lease"),
)

searches = table(  # a row without a recipe is a reset: presets are in force again
    "searches",
    key(),
    foreign_key("model_id", "models.id"),
    sa.Column("kind", sa.String(10), nullable=False),
    json("recipe", nullable=True),
    digest("recipe_digest", nullable=True),
    sa.Column("score", sa.Float),
    json("evidence"),
    *audit_columns(),
    sa.CheckConstraint(in_list("kind", ("class", "subset")), name="kind"),
    sa.CheckConstraint("(recipe IS NULL) = (recipe_digest IS NULL)", name="recipe_digest"),
    sa.CheckConstraint("(recipe IS NULL) = (score IS NULL)", name="score"),
    sa.Index("ix_searches_model_id_kind_created_at", "model_id", "kind", "created_at"),
)

audit_events = table(
    "audit_events",
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    moment("at"),
    sa.Column("event", sa.String(40), nullable=False),
    sa.Column("model", sa.String(100)),
    sa.Column("request", sa.String(40)),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False, unique=True),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Index("ix_audit_events_model_seq", "model", "seq"),
)
