"""Deleting: what the policies of models want deleted by now, and what nothing refers to."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from fsu_ray.records import OPERATOR
from fsu_ray.service.stores import Stores

if TYPE_CHECKING:
    from fsu_ray.retention import DeletableFiles, RetentionResult


class Retention:
    """`service.retention`. Each deletion of an artifact is recorded first."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def tidy(self, model: str | None = None) -> RetentionResult:
        """Purge target samples and retire generators as the policies of models want by now; raises NotFound."""
        from fsu_ray.retention import tidy

        return tidy(self._stores.ledger, self._stores.artifacts, model)

    def collect_garbage(
        self, older_than: timedelta | None = None, dry_run: bool = False, actor: str = OPERATOR
    ) -> DeletableFiles:
        """Delete artifacts that the ledger does not refer to, and checkpoints of runs and searches that are over.

        Returns what was deleted, or with `dry_run` what would be. Stray artifacts and searches younger than
        `older_than` (a day) stay, and so does everything that a running request may have written.
        """
        from fsu_ray.retention import STRAY_AFTER, collect, garbage
        from fsu_ray.storage.checkpoints import Checkpoints
        from fsu_ray.storage.database import check_actor

        check_actor(actor)
        ledger, artifacts = self._stores.ledger, self._stores.artifacts
        runs = Checkpoints(self._stores.settings.runs)
        rubbish = garbage(ledger, artifacts, runs, STRAY_AFTER if older_than is None else older_than)
        if not dry_run:
            collect(ledger, artifacts, runs, rubbish, actor)
        return rubbish
