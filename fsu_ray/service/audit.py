"""The audit chain: verifying it, exporting it, reading it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fsu_ray.errors import UserError
from fsu_ray.service.stores import Stores

if TYPE_CHECKING:
    from fsu_ray.storage.audit import Verdict
    from fsu_ray.storage.bundle import Checked
    from fsu_ray.storage.chain import ChainHead, Event


class Audit:
    """`service.audit`. `verify_bundle` and `keygen` open no ledger."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def verify(self, artifacts: bool = True, head: str | None = None) -> Verdict:
        """Recompute the chain and compare the ledger with it, and with `artifacts` the content of every artifact.

        `head` is `SEQ:HASH` as `head` returned it earlier: the chain must still contain it. `Verdict.check` raises
        AuditFailed for the first finding. Raises UserError for an empty ledger or a malformed head.
        """
        noted = _parsed(head)
        verdict = self._stores.ledger.audit.verify(self._stores.artifacts if artifacts else None, noted)
        if not verdict.events + verdict.found:
            raise UserError("the ledger is empty: there is nothing to verify; check FSU_LEDGER and FSU_HOME")
        return verdict

    def verify_bundle(self, file: Path, public_key: Path | None = None, head: str | None = None) -> Checked:
        """Verify an exported file alone; with `public_key` (PEM) the file must be signed with that key.

        Raises InvalidData where the file is no bundle, AuditFailed where it is damaged, UserError for the key or head.
        """
        from fsu_ray.storage.bundle import verify

        return verify(file, public_key, _parsed(head))

    def export(
        self,
        file: Path,
        form: Literal["jsonl", "parquet"] = "jsonl",
        *,
        model: str | None = None,
        key: Path | None = None,
        force: bool = False,
    ) -> dict[str, Any]:
        """Write the whole chain into `file` and return its manifest, signed with the private `key` (PEM) if given.

        `model` says what the file is about; it holds the whole chain all the same. Raises AlreadyExists without
        `force`, NotFound, UserError, AuditFailed.
        """
        from fsu_ray.storage.bundle import write

        return write(self._stores.ledger, file, form, model=model, key=key, force=force)

    def keygen(self, file: Path) -> str:
        """Write a new private key to `file`, which must not exist, and return the public key (PEM)."""
        from fsu_ray.storage.bundle import keygen

        return keygen(file)

    def head(self) -> ChainHead:
        """The number and the hash of the last event. Kept elsewhere, they show later that nothing was cut off."""
        return self._stores.ledger.audit.head()

    def log(self, model: str | None = None, request: str | None = None, last: int | None = None) -> list[Event]:
        """The events of the chain, oldest first, of one model or request, the `last` ones only; raises NotFound."""
        return self._stores.ledger.audit.log(model, request, last)


def _parsed(head: str | None) -> ChainHead | None:
    from fsu_ray.storage.chain import ChainHead

    return None if head is None else ChainHead.parse(head)
