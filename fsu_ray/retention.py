"""Deletion: target samples and generators by policy, artifacts that nothing refers to, checkpoints of ended work.

Samples, generators and artifacts are first recorded in the ledger as removed and then deleted. Checkpoints have no
record.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fsu_ray.errors import NotFound, TransitionRefused
from fsu_ray.records import Digest, Generator
from fsu_ray.storage.artifacts import Artifacts
from fsu_ray.storage.checkpoints import Checkpoints, RunFolder
from fsu_ray.storage.generators import Why
from fsu_ray.storage.ledger import Ledger

POLICY = "policy"
"""The actor of what a policy has had deleted."""

STRAY_AFTER = timedelta(days=1)
"""The age at which an artifact without a reference may be deleted: a run writes artifacts before the ledger's rows."""


@dataclass(frozen=True)
class RetentionResult:
    """What policies have had deleted: ids of requests with purged samples, and ids of retired generators."""

    purged: tuple[str, ...]
    retired: tuple[str, ...]


@dataclass(frozen=True)
class DeletableFiles:
    """Files that may be deleted, by name, with their sizes in bytes.

    `stray`: artifacts that nothing refers to. `late`: artifacts that the ledger has recorded as removed. `unfinished`:
    parts of artifacts whose writers were killed. `checkpoints`: run folders of ended requests and of searches.
    """

    stray: dict[str, int]
    late: dict[str, int]
    unfinished: dict[str, int]
    checkpoints: dict[str, int]


def tidy(ledger: Ledger, artifacts: Artifacts, model: str | None = None) -> RetentionResult:
    """Apply the policies of one model or of all: purge the samples and retire the generators that are due by now."""
    purged, retired = [], []
    for request in ledger.requests.due_samples(model):
        try:
            destroy(artifacts, ledger.requests.purge(request, POLICY))
        except TransitionRefused:  # submitted again at this moment: purged another time
            continue
        purged.append(request.id)
    for name in [model] if model else [each.name for each in ledger.models.all()]:
        for generator, why in ledger.generators.due(name):
            try:
                retire(ledger, artifacts, generator.id, why, POLICY)
            except TransitionRefused:  # a run may be using it: retired another time
                continue
            retired.append(generator.id)
    return RetentionResult(tuple(purged), tuple(retired))


def retire(ledger: Ledger, artifacts: Artifacts, generator: str, why: Why, actor: str) -> Generator:
    """Retire the generator whose id is or begins with `generator`, and delete its weights and its D'."""
    retired, removed = ledger.generators.retire(generator, why, actor)
    destroy(artifacts, removed)
    return retired


def destroy(artifacts: Artifacts, digests: Iterable[str]) -> None:
    """Delete artifacts that the ledger has recorded as removed."""
    for digest in digests:
        artifacts.delete(digest)


def garbage(
    ledger: Ledger, artifacts: Artifacts, runs: Checkpoints, stray_after: timedelta = STRAY_AFTER
) -> DeletableFiles:
    """The files that may be deleted now.

    Left out are files that a running request may have written, and run folders of requests that this ledger does not
    know. The ledger knows only the results of searches, so their folders are deletable once older than `stray_after`.
    """
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
        checkpoints=_deletable_runs(ledger, runs, before),
    )


def _deletable_runs(ledger: Ledger, runs: Checkpoints, before: datetime) -> dict[str, int]:
    """Run folders of requests that have ended, and of searches that have written nothing since `before`."""

    def deletable(run: RunFolder) -> bool:
        if run.request is None:
            return run.at < before
        try:
            return ledger.requests.get(run.request).status.is_terminal
        except NotFound:
            return False

    return {name: run.size for name, run in runs.folders().items() if deletable(run)}


def collect(ledger: Ledger, artifacts: Artifacts, runs: Checkpoints, files: DeletableFiles, actor: str) -> None:
    """Delete `files`; stray artifacts that the ledger refers to by now are kept."""
    destroy(artifacts, files.late)
    destroy(artifacts, ledger.discard(map(Digest, files.stray), actor))
    for name in files.unfinished:
        artifacts.discard(name)
    for name in files.checkpoints:
        runs.delete(name)
