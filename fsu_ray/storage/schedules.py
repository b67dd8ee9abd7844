"""Schedules and the windows that they have fired. `fsu_ray.schedule` computes when a window starts."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fsu_ray.errors import LeaseLost, TransitionRefused
from fsu_ray.records import OPERATOR, Schedule, Window
from fsu_ray.storage import chain, rows
from fsu_ray.storage.database import Database, violated_constraint
from fsu_ray.storage.schema import schedule_events, schedule_windows, schedules


class Schedules:
    """The ledger's schedules. Their terms never change; their states (active, paused, removed) are history."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, model: str, cron: str, timezone: str, max_requests: int | None, minutes: int | None, actor: str = OPERATOR
    ) -> Schedule:
        """A new, active schedule; the caller has checked `cron` and `timezone`. Raises NotFound."""
        with self._database.writing(f"a schedule of {model!r}", actor) as connection:
            record, moment = rows.fetch_model(connection, model), rows.now()
            values: dict[str, Any] = {"id": rows.new_id("s"), "model_id": record.id, "cron": cron, "timezone": timezone}
            values |= {"max_requests": max_requests, "minutes": minutes, "created_at": moment}
            chain.insert(connection, "schedule_added", schedules, values, actor=actor, model=model)
            _insert_state(connection, values["id"], model, "active", actor, moment)
            return _fetch(connection, str(values["id"]))

    def set_state(self, id_or_prefix: str, state: str, actor: str = OPERATOR) -> Schedule:
        """Pause a schedule, resume it (`active`), or remove it for good. An open window whose lease has expired is
        closed.

        Raises NotFound, TransitionRefused where the schedule is in that state already or removed.
        """
        with self._database.writing(f"schedule {id_or_prefix}", actor) as connection:
            schedule = _fetch(connection, id_or_prefix)
            if schedule.state == "removed":
                raise TransitionRefused(f"schedule {schedule.id} is removed; `fsu schedule add` makes another")
            if schedule.state == state:
                raise TransitionRefused(f"schedule {schedule.id} is {schedule.state} already")
            moment = rows.now_after(schedule.changed_at)
            connection.execute(_update_expired(schedule.id, moment).values(lease_until=None, finished_at=moment))
            _insert_state(connection, schedule.id, schedule.model, state, actor, moment)
            return _fetch(connection, schedule.id)

    def get(self, id_or_prefix: str) -> Schedule:
        """One schedule, also a removed one; raises NotFound where the prefix fits none or several."""
        with self._database.reading() as connection:
            return _fetch(connection, id_or_prefix)

    def all(self, model: str | None = None, *, removed: bool = False) -> list[Schedule]:
        """Schedules, oldest first, the removed ones only with `removed`; raises NotFound for an unknown model."""
        with self._database.reading() as connection:
            query = rows.of_model(connection, _SCHEDULES, schedules, model).order_by(*rows.oldest_first(schedules))
            chosen = [_to_schedule(row) for row in connection.execute(query).mappings()]
            return [schedule for schedule in chosen if removed or schedule.state != "removed"]

    def windows(self, schedule: str) -> list[Window]:
        """The windows that a schedule has fired, oldest first."""
        with self._database.reading() as connection:
            query = _windows_of(schedule).order_by(schedule_windows.c.starts_at)
            return [_to_window(row) for row in connection.execute(query).mappings()]

    def last_window(self, schedule: str) -> Window | None:
        """The latest window that a schedule has fired; no earlier window is open."""
        with self._database.reading() as connection:
            query = _windows_of(schedule).order_by(schedule_windows.c.starts_at.desc()).limit(1)
            row = connection.execute(query).mappings().first()
            return None if row is None else _to_window(row)

    def fire(
        self, schedule: Schedule, starts_at: datetime, missed: int, worker: str, lease_seconds: float
    ) -> Window | None:
        """Open the window that starts at `starts_at`. The table's primary key lets a window be opened once.

        None where this window or a later one was opened, where a window of the schedule is open, and where the schedule
        is not active.
        """
        try:
            with self._database.writing(f"schedule {schedule.id}") as connection:
                if not _may_fire(connection, schedule.id, starts_at):
                    return None
                moment = rows.now()
                values: dict[str, Any] = {"schedule_id": schedule.id, "starts_at": starts_at, "missed": missed}
                values["fired_at"] = moment
                lease = {"worker": worker, "lease_until": moment + timedelta(seconds=lease_seconds)}
                insert = sa.insert(schedule_windows).values(**values, **lease).returning(schedule_windows)
                window = _to_window(connection.execute(insert).mappings().one())
                recorded = chain.row_of(schedule_windows, values, tuple(values))
                chain.note(connection, "window_fired", schedule_windows, recorded, actor=worker, model=schedule.model)
                return window
        except IntegrityError as error:
            if not any(name in violated_constraint(error) for name in _FIRED):
                raise
            return None

    def resume_window(self, schedule: Schedule, worker: str, lease_seconds: float) -> Window | None:
        """Take over the open window of a schedule whose lease has expired; None without one."""
        with self._database.writing(f"schedule {schedule.id}") as connection:
            moment = rows.now()
            lease = {"worker": worker, "lease_until": moment + timedelta(seconds=lease_seconds)}
            update = _update_expired(schedule.id, moment).values(**lease).returning(schedule_windows)
            row = connection.execute(update).mappings().one_or_none()
            return None if row is None else _to_window(row)

    def renew_window(self, window: Window, lease_seconds: float, requests: int | None = None) -> None:
        """Renew the lease of a window in which `requests` were carried out so far (None: as many as before).

        Raises LeaseLost where the window is closed or another scheduler holds it.
        """
        count = {} if requests is None else {"requests": requests}
        self._update(window, lease_until=rows.now() + timedelta(seconds=lease_seconds), **count)

    def release_window(self, window: Window, requests: int) -> None:
        """Leave a window open for the next scheduler, with `requests` carried out so far; raises LeaseLost."""
        self._update(window, lease_until=rows.now(), requests=requests)

    def close_window(self, window: Window, requests: int) -> None:
        """Close a window in which `requests` were carried out; raises LeaseLost where another scheduler holds it."""
        self._update(window, lease_until=None, finished_at=rows.now(), requests=requests)

    def _update(self, window: Window, **values: object) -> None:
        with self._database.writing(f"schedule {window.schedule}") as connection:
            update = sa.update(schedule_windows).where(
                schedule_windows.c.schedule_id == window.schedule,
                schedule_windows.c.starts_at == window.starts_at,
                schedule_windows.c.worker == window.worker,
                _OPEN,
            )
            if connection.execute(update.values(**values)).rowcount != 1:
                raise LeaseLost(
                    f"the window of {window.starts_at:%Y-%m-%d %H:%M} UTC of schedule {window.schedule} is closed or "
                    f"another scheduler has it; `fsu schedule show {window.schedule}` says which"
                )


_FIRED = ("pk_schedule_windows", "this window has been fired")
"""The primary key of the windows, as PostgreSQL names it; on SQLite, the message of the trigger that refuses first."""

_OPEN = schedule_windows.c.finished_at.is_(None)
"""The condition that a window is open."""


def _windows_of(schedule: str) -> sa.Select[Any]:
    return sa.select(schedule_windows).where(schedule_windows.c.schedule_id == schedule)


def _may_fire(connection: sa.Connection, schedule: str, starts_at: datetime) -> bool:
    """Whether a schedule is active, has no open window, and no window at this time or later."""
    state = connection.scalar(sa.select(_newest_state(schedule_events.c.state)).where(schedules.c.id == schedule))
    obstacle = _windows_of(schedule).where(sa.or_(schedule_windows.c.starts_at >= starts_at, _OPEN)).limit(1)
    return state == "active" and connection.execute(obstacle).first() is None


def _update_expired(schedule: str, moment: datetime) -> sa.Update:
    """An UPDATE of the open window of a schedule whose lease has expired."""
    return sa.update(schedule_windows).where(
        schedule_windows.c.schedule_id == schedule, _OPEN, schedule_windows.c.lease_until <= moment
    )


def _newest_state(column: sa.Column[object]) -> sa.ScalarSelect[object]:
    """A column of the newest event of a schedule."""
    events = sa.select(column).where(schedule_events.c.schedule_id == schedules.c.id)
    return events.order_by(*rows.newest_first(schedule_events)).limit(1).correlate(schedules).scalar_subquery()


_SCHEDULES = rows.with_model(schedules).add_columns(
    _newest_state(schedule_events.c.state).label("state"),
    _newest_state(schedule_events.c.created_at).label("changed_at"),
)


def _fetch(connection: sa.Connection, id_or_prefix: str) -> Schedule:
    return _to_schedule(rows.fetch_by_id(connection, _SCHEDULES, schedules, id_or_prefix))


def _insert_state(
    connection: sa.Connection, schedule: object, model: str, state: str, actor: str, moment: datetime
) -> None:
    values: dict[str, Any] = {"id": rows.new_id("n"), "schedule_id": schedule, "state": state, "created_at": moment}
    chain.insert(connection, f"schedule_{state}", schedule_events, values, actor=actor, model=model)


def _to_schedule(row: sa.RowMapping) -> Schedule:
    return Schedule(
        id=row["id"],
        model=row["model"],
        cron=row["cron"],
        timezone=row["timezone"],
        max_requests=row["max_requests"],
        minutes=row["minutes"],
        state=row["state"],
        actor=row["actor"],
        created_at=row["created_at"],
        changed_at=row["changed_at"],
    )


def _to_window(row: sa.RowMapping) -> Window:
    return Window(
        schedule=row["schedule_id"],
        starts_at=row["starts_at"],
        missed=row["missed"],
        fired_at=row["fired_at"],
        worker=row["worker"],
        lease_until=row["lease_until"],
        finished_at=row["finished_at"],
        requests=row["requests"],
    )
