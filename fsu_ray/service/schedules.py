"""Schedules: when the requests of a model are carried out. `Service.run_windows` carries them out."""

from __future__ import annotations

from datetime import UTC, datetime

from fsu_ray.records import OPERATOR, Schedule, Window
from fsu_ray.service.stores import Stores


class Schedules:
    """`service.schedules`. Where an id is wanted, the beginning of it is enough."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def add(
        self,
        model: str,
        cron: str,
        timezone: str = "UTC",
        max_requests: int | None = None,
        minutes: int | None = None,
        actor: str = OPERATOR,
    ) -> Schedule:
        """Have the requests of a model carried out from each time of `cron` in `timezone` on.

        `cron` has five fields: minute, hour, day of month, month, day of week. A window ends after `max_requests`
        attempts, and takes nothing new after `minutes`. Raises NotFound, UserError.
        """
        from fsu_ray.schedule import check_schedule

        checked = check_schedule(cron, timezone, minutes, max_requests)
        return self._stores.ledger.schedules.add(model, checked, timezone, max_requests, minutes, actor)

    def all(self, model: str | None = None) -> list[Schedule]:
        """Schedules that are not removed, oldest first; raises NotFound."""
        return self._stores.ledger.schedules.all(model)

    def get(self, schedule: str) -> Schedule:
        """One schedule, removed or not; raises NotFound where the id fits none or several."""
        return self._stores.ledger.schedules.get(schedule)

    def windows(self, schedule: Schedule) -> list[Window]:
        """The windows of a schedule so far, oldest first."""
        return self._stores.ledger.schedules.windows(schedule.id)

    def last_window(self, schedule: Schedule) -> Window | None:
        """The latest window of a schedule."""
        return self._stores.ledger.schedules.last_window(schedule.id)

    def pause(self, schedule: str, actor: str = OPERATOR) -> Schedule:
        """Open no window until the schedule is resumed; raises NotFound, TransitionRefused."""
        return self._stores.ledger.schedules.set_state(schedule, "paused", actor)

    def resume(self, schedule: str, actor: str = OPERATOR) -> Schedule:
        """Open windows again, from the next time on; raises NotFound, TransitionRefused."""
        return self._stores.ledger.schedules.set_state(schedule, "active", actor)

    def remove(self, schedule: str, actor: str = OPERATOR) -> Schedule:
        """Open no window ever again; the record stays. Raises NotFound, TransitionRefused."""
        return self._stores.ledger.schedules.set_state(schedule, "removed", actor)

    def next_start(self, schedule: Schedule) -> datetime | None:
        """The next start of a window, in UTC; None where the schedule is not active."""
        from fsu_ray.schedule import next_start

        return next_start(schedule, datetime.now(UTC)) if schedule.state == "active" else None

    def local_time(self, schedule: Schedule, moment: datetime | None) -> str:
        """`moment` in the time zone of the schedule, to the minute; empty for None."""
        from fsu_ray.schedule import local

        return "" if moment is None else local(schedule, moment)
