"""The ledger's schedules and the windows that they have fired. When a window begins is for `schedule` to say."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fsu_ray.errors import LeaseLost, TransitionRefused
from fsu_ray.records import Schedule, Window
from fsu_ray.storage import chain, engines, rows
from fsu_ray.storage.database import Database
from fsu_ray.storage.policies import OPERATOR, check_actor
from fsu_ray.storage.schema import models, schedule_events, schedule_windows, schedules


class Schedules:
    """Schedules: their terms never change, their states (active, paused, removed) are history."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, model: str, cron: str, timezone: str, max_requests: int | None, minutes: int | None, actor: str = OPERATOR
    ) -> Schedule:
        """A new, active schedule; `cron` and `timezone` must have been checked. Raises NotFound."""
        check_actor(actor)
        with self._database.writing(f"a schedule of {model!r}") as connection:
            line, moment = rows.fetch_model(connection, model), rows.now()
            values: dict[str, Any] = {"id": rows.new_id("s"), "model_id": line.id, "cron": cron, "timezone": timezone}
            values |= {"max_requests": max_requests, "minutes": minutes, "created_at": moment, "actor": actor}
            chain.insert(connection, "schedule_added", schedules, values, actor=actor, model=model)
            _keep_state(connection, values["id"], model, "active", actor, moment)
            return _fetch(connection, str(values["id"]))

    def set_state(self, id_or_prefix: str, state: str, actor: str = OPERATOR) -> Schedule:
        """Pause, resume (`active`) or remove a schedule, for good; a window of it that nobody holds any more is closed.

        Raises NotFound, TransitionRefused where it is in that state already or removed.
        """
        check_actor(actor)
        with self._database.writing(f"schedule {id_or_prefix}") as connection:
            found = _fetch(connection, id_or_prefix)
            if found.state == "removed":
                raise TransitionRefused(f"schedule {found.id} is removed; `fsu schedule add` makes another")
            if found.state == state:
                raise TransitionRefused(f"schedule {found.id} is {found.state} already")
            moment = rows.now_after(found.changed_at)
            connection.execute(_abandoned(found.id, moment).values(lease_until=None, finished_at=moment))
            _keep_state(connection, found.id, found.model, state, actor, moment)
            return _fetch(connection, found.id)

    def get(self, id_or_prefix: str) -> Schedule:
        """One schedule, be it removed; raises NotFound where the prefix fits none or several."""
        with self._database.reading() as connection:
            return _fetch(connection, id_or_prefix)

    def all(self, model: str | None = None, *, removed: bool = False) -> list[Schedule]:
        """Schedules, oldest first, without those that are `removed`; raises NotFound for a model that is not there."""
        with self._database.reading() as connection:
            query = _SCHEDULES.order_by(schedules.c.created_at, schedules.c.id)
            if model is not None:
                query = query.where(schedules.c.model_id == rows.fetch_model(connection, model).id)
            found = [_to_schedule(row) for row in connection.execute(query).mappings()]
            return [each for each in found if removed or each.state != "removed"]

    def windows(self, schedule: str) -> list[Window]:
        """The windows that a schedule has fired, oldest first."""
        with self._database.reading() as connection:
            query = sa.select(schedule_windows).where(schedule_windows.c.schedule_id == schedule)
            ordered = query.order_by(schedule_windows.c.starts_at)
            return [_to_window(row) for row in connection.execute(ordered).mappings()]

    def last_window(self, schedule: str) -> Window | None:
        """The latest window that a schedule has fired; only this one can still be open."""
        query = sa.select(schedule_windows).where(schedule_windows.c.schedule_id == schedule)
        with self._database.reading() as connection:
            row = connection.execute(query.order_by(schedule_windows.c.starts_at.desc()).limit(1)).mappings().first()
            return None if row is None else _to_window(row)

    def fire(
        self, schedule: Schedule, starts_at: datetime, missed: int, worker: str, lease_seconds: float
    ) -> Window | None:
        """Open the window that starts at `starts_at`, once: the table's key sees to that.

        None where another scheduler has opened it or a later one, where a window of the schedule is still open, and
        where the schedule is not active any more.
        """
        try:
            with self._database.writing(f"schedule {schedule.id}") as connection:
                if not _may_fire(connection, schedule.id, starts_at):
                    return None
                moment = rows.now()
                values: dict[str, Any] = {"schedule_id": schedule.id, "starts_at": starts_at, "missed": missed}
                values["fired_at"] = moment
                held = {"worker": worker, "lease_until": moment + timedelta(seconds=lease_seconds)}
                insert = sa.insert(schedule_windows).values(**values, **held).returning(schedule_windows)
                window = _to_window(connection.execute(insert).mappings().one())
                fired = chain.row_of(schedule_windows, values, tuple(values))
                chain.note(connection, "window_fired", schedule_windows, fired, actor=worker, model=schedule.model)
                return window
        except IntegrityError as error:
            if not any(name in engines.violated(error.orig) for name in _FIRED):
                raise
            return None

    def resume_window(self, schedule: Schedule, worker: str, lease_seconds: float) -> Window | None:
        """Take over the open window of a schedule whose lease is over; None where there is none."""
        with self._database.writing(f"schedule {schedule.id}") as connection:
            moment = rows.now()
            values = {"worker": worker, "lease_until": moment + timedelta(seconds=lease_seconds)}
            update = _abandoned(schedule.id, moment).values(**values).returning(schedule_windows)
            row = connection.execute(update).mappings().one_or_none()
            return None if row is None else _to_window(row)

    def renew_window(self, window: Window, lease_seconds: float, requests: int | None = None) -> None:
        """Renew the lease of a window, in which `requests` were carried out so far (None: as many as before).

        Raises LeaseLost where the window is closed or another scheduler has it.
        """
        counted = {} if requests is None else {"requests": requests}
        self._change(window, lease_until=rows.now() + timedelta(seconds=lease_seconds), **counted)

    def release_window(self, window: Window, requests: int) -> None:
        """Leave a window open for the next scheduler, with the number of `requests` so far; raises LeaseLost."""
        self._change(window, lease_until=rows.now(), requests=requests)

    def close_window(self, window: Window, requests: int) -> None:
        """Close a window in which `requests` were carried out; raises LeaseLost where another scheduler has it."""
        self._change(window, lease_until=None, finished_at=rows.now(), requests=requests)

    def _change(self, window: Window, **values: object) -> None:
        with self._database.writing(f"schedule {window.schedule}") as connection:
            update = sa.update(schedule_windows).where(
                schedule_windows.c.schedule_id == window.schedule,
                schedule_windows.c.starts_at == window.starts_at,
                schedule_windows.c.worker == window.worker,
                schedule_windows.c.finished_at.is_(None),
            )
            if connection.execute(update.values(**values)).rowcount != 1:
                raise LeaseLost(
                    f"the window of {window.starts_at:%Y-%m-%d %H:%M} UTC of schedule {window.schedule} is closed or "
                    f"another scheduler has it; `fsu schedule show {window.schedule}` says which"
                )


_FIRED = ("pk_schedule_windows", "this window has been fired")
"""The key of the windows by its name, and what a trigger says in its stead on SQLite."""


def _may_fire(connection: sa.Connection, schedule: str, starts_at: datetime) -> bool:
    """Whether a schedule is active, has no open window, and none of this time or a later one."""
    state = connection.scalar(sa.select(_newest_state(schedule_events.c.state)).where(schedules.c.id == schedule))
    bars = sa.or_(schedule_windows.c.starts_at >= starts_at, schedule_windows.c.finished_at.is_(None))
    barred = sa.select(sa.literal(1)).where(schedule_windows.c.schedule_id == schedule, bars).limit(1)
    return state == "active" and connection.scalar(barred) is None


def _abandoned(schedule: str, moment: datetime) -> sa.Update:
    """An UPDATE of the open window of a schedule whose lease is over."""
    return sa.update(schedule_windows).where(
        schedule_windows.c.schedule_id == schedule,
        schedule_windows.c.finished_at.is_(None),
        schedule_windows.c.lease_until <= moment,
    )


def _newest_state(column: sa.Column[object]) -> sa.ScalarSelect[object]:
    newest = sa.select(column).where(schedule_events.c.schedule_id == schedules.c.id)
    ordered = newest.order_by(schedule_events.c.created_at.desc(), schedule_events.c.id.desc())
    return ordered.limit(1).correlate(schedules).scalar_subquery()


_SCHEDULES = sa.select(
    schedules,
    models.c.name.label("model"),
    _newest_state(schedule_events.c.state).label("state"),
    _newest_state(schedule_events.c.created_at).label("changed_at"),
).join(models, models.c.id == schedules.c.model_id)


def _fetch(connection: sa.Connection, id_or_prefix: str) -> Schedule:
    return _to_schedule(rows.fetch_by_id(connection, _SCHEDULES, schedules, id_or_prefix))


def _keep_state(
    connection: sa.Connection, schedule: object, model: str, state: str, actor: str, moment: datetime
) -> None:
    values: dict[str, Any] = {"id": rows.new_id("n"), "schedule_id": schedule, "state": state}
    values |= {"created_at": moment, "actor": actor}
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
