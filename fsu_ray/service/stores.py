"""The two stores that every use case works on: the ledger and the artifacts."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from fsu_ray.config import Settings, Timings, read_settings

if TYPE_CHECKING:
    from fsu_ray.storage.artifacts import Artifacts
    from fsu_ray.storage.ledger import Ledger


class Stores:
    """The settings, and the ledger and the artifacts that they name. Each is read or opened when it is first used."""

    def __init__(self, settings: Settings | None, timings: Timings) -> None:
        self._settings = settings
        self.timings = timings

    @cached_property
    def settings(self) -> Settings:
        """The settings: by default those of the environment and of fsu.toml; raises InvalidConfig."""
        return self._settings or read_settings()

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger, created where it is missing; raises InvalidConfig or LedgerUnavailable."""
        from fsu_ray.storage.ledger import open_ledger

        return open_ledger(self.settings.ledger, self.timings)

    @cached_property
    def artifacts(self) -> Artifacts:
        """The artifact store, created where it is missing; raises InvalidConfig or StorageError."""
        from fsu_ray.storage.artifacts import Artifacts

        return Artifacts.open(self.settings.artifacts)

    def close(self) -> None:
        """Close the ledger's connections."""
        if "ledger" in vars(self):
            self.ledger.close()
