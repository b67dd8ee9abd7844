"""What is to be destroyed: target samples, generators and stray artifacts, each recorded first and deleted then; and
checkpoints of what is over, of which there is no record."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fsu_ray.errors import NotFound, TransitionRefused
from fsu_ray.records import Generator
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.checkpoints import Checkpoints, RunFolder
from fsu_ray.storage.generators import Why
from fsu_ray.storage.ledger import Ledger

STRAY_AFTER = timedelta(days=1)
"""How old an artifact that nothing refers to must be: what a run has just written is not in the ledger yet."""


@dataclass(frozen=True)
class RetentionResult:
    """What the policies have had destroyed: requests whose samples were purged, generators that were retired."""

    purged: tuple[str, ...]
    retired: tuple[str, ...]


@dataclass(frozen=True)
class DeletableFiles:
    """What to delete, with its bytes: `stray` artifacts that nothing refers to, `late` ones that are on record as
    removed, `unfinished` ones whose writers were killed; `checkpoints` of runs whose requests have ended, and of
    searches."""

    stray: dict[str, int]
    late: dict[str, int]
    unfinished: dict[str, int]
    checkpoints: dict[str, int]


def tidy(ledger: Ledger, artifacts: Artifacts, model: str | None = None, actor: str = "policy") -> RetentionResult:
    """Purge the samples and retire the generators that policies want gone by now, of one model or of all."""
    purged, retired = [], []
    for request in ledger.requests.due_samples(model):
        try:
            destroy(artifacts, ledger.requests.purge(request, actor))
        except TransitionRefused:  # submitted again in this very moment: another time
            continue
        purged.append(request.id)
    for name in [model] if model else [each.name for each in ledger.models.all()]:
        for generator, why in ledger.generators.due(name):
            try:
                retire(ledger, artifacts, generator.id, why, actor)
            except TransitionRefused:  # a run may be using it: another time
                continue
            retired.append(generator.id)
    return RetentionResult(tuple(purged), tuple(retired))


def retire(ledger: Ledger, artifacts: Artifacts, generator: str, why: Why, actor: str) -> Generator:
    """Retire a generator and delete its weights and its D'."""
    retired, gone = ledger.generators.retire(generator, why, actor)
    destroy(artifacts, gone)
    return retired


def destroy(artifacts: Artifacts, digests: list[str]) -> None:
    """Delete what the ledger has recorded as removed."""
    for digest in digests:
        artifacts.delete(digest)


def garbage(
    ledger: Ledger, artifacts: Artifacts, runs: Checkpoints, stray_after: timedelta = STRAY_AFTER
) -> DeletableFiles:
    """What may be deleted now. What may be the work of a running request is left alone, and so are runs of requests
    that this ledger does not know. Of a search the ledger knows its result alone: its checkpoints go by their age."""
    needed, removed = ledger.references()
    oldest = ledger.requests.oldest_run()
    before = datetime.now(UTC) - stray_after
    if oldest is not None:
        before = min(before, oldest)
    stored = artifacts.digests()
    return DeletableFiles(
        stray={d: size for d, (size, at) in stored.items() if d not in needed | removed and at < before},
        late={d: size for d, (size, _) in stored.items() if d in removed},
        unfinished=artifacts.unfinished(before),
        checkpoints=_over(ledger, runs, before),
    )


def _over(ledger: Ledger, runs: Checkpoints, before: datetime) -> dict[str, int]:
    """Folders of runs whose requests have ended, and of searches that have written nothing since `before`."""

    def over(kept: RunFolder) -> bool:
        if kept.request is None:
            return kept.at < before
        try:
            return ledger.requests.get(kept.request).status.is_terminal
        except NotFound:
            return False

    return {name: kept.size for name, kept in runs.folders().items() if over(kept)}


def collect(ledger: Ledger, artifacts: Artifacts, runs: Checkpoints, found: DeletableFiles, actor: str) -> None:
    """Delete `found`."""
    destroy(artifacts, list(found.late))
    destroy(artifacts, ledger.discard(found.stray, actor))
    for name in found.unfinished:
        artifacts.discard(name)
    for name in found.checkpoints:
        runs.delete(name)
