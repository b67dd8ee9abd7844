"""What is asked of the ledger from outside a run: what comes next, how much there is, and whose worker is dead."""

from __future__ import annotations

import sqlalchemy as sa

from fsu_ray.records import Figures, Request, Status
from fsu_ray.storage import claims, rows
from fsu_ray.storage.database import Part
from fsu_ray.storage.schema import erasures, models, requests


class Watching(Part):
    """The ledger as those see it who run nothing themselves."""

    def upcoming(self, model: str | None = None) -> Request | None:
        """The request that `claim` would begin now, as it is; raises NotFound for a model that is not there."""
        with self._database.reading() as connection:
            line = None if model is None else rows.fetch_model(connection, model)
            return claims.upcoming(connection, line, rows.now())

    def expire(self, request: Request) -> bool:
        """End the lease of a running request, as it was read, whose worker is known to be dead: the next claim takes it
        over at once, and counts the failure. False where it has gone on or ended meanwhile.

        A worker that lives after all renews its lease, as long as nobody has taken the request over.
        """
        with self._database.stepping(f"request {request.id}") as connection:
            return claims.expire(connection, request, rows.now())

    def figures(self) -> Figures:
        """How many requests and erasures of each sort there are."""
        states = sa.select(models.c.name, requests.c.status, sa.func.count()).join_from(requests, models)
        uses = sa.select(models.c.name, erasures.c.generator_use, sa.func.count()).join_from(erasures, models)
        with self._database.reading() as connection:
            names = connection.scalars(sa.select(models.c.name)).all()
            stated = connection.execute(states.group_by(models.c.name, requests.c.status)).all()
            used = connection.execute(uses.group_by(models.c.name, erasures.c.generator_use)).all()
            ready = claims.ready(connection, rows.now())
            return Figures(
                {(name, state.value): 0 for name in names for state in Status}
                | {(name, str(Status(state).value)): number for name, state, number in stated},
                dict.fromkeys(names, 0) | ready,
                {(name, use): number for name, use, number in used},
            )
