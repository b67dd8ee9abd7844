"""The audit chain as a file that is checked by itself, far from the ledger.

A bundle has the whole chain, since a part of it proves nothing, and a manifest that says what the bundle is and
what it proves. As `jsonl` its first line is the manifest and its last one says how many events there are and how
they end; each line between is an event: canonical JSON, and at its end its `hash`, the SHA-256 of the line without
that member. As `parquet` it is a table of the events with the manifest in its metadata. The manifest, and with it
the head of the chain, may be signed (Ed25519).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import sqlalchemy as sa
from pyarrow import parquet

from fsu_ray.errors import AlreadyExists, AuditFailed, InvalidData, UserError
from fsu_ray.storage import chain, signing
from fsu_ray.storage.audit import Findings, Verdict, count_of
from fsu_ray.storage.chain import ChainHead, Event
from fsu_ray.storage.columns import moment_text
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.rows import now

Form = Literal["jsonl", "parquet"]

FORMAT = 1
"""The version of what is in a bundle."""

PROVES = ("These are all events of the ledger up to the head, in their order, as they were written.",)
PROVES_NOT = (
    "That what was written was true: the chain shows that history was not altered after it was written.",
    "That nothing was cut off at the end: only a head that was noted elsewhere tells, or the signature of a key that "
    "you trust.",
    "That a behaviour is gone: unlearning is approximate, and its figures are measures, not a guarantee.",
    "Anything about weights and data: the bundle has the digests of artifacts, not the artifacts.",
)

_KIND = "fsu_ray audit bundle"
_METADATA = _KIND.replace(" ", "_").encode()
_SCHEMA = pa.schema([(name, pa.int64() if name == "seq" else pa.string()) for name in Event._fields])
_TEXT = r'"(?:[^"\\]|\\.)*"'
_EVENT = re.compile(
    rf'\{{"actor":({_TEXT}),"at":({_TEXT}),"detail":(.*),"event":({_TEXT}),"model":(null|{_TEXT}),"previous":({_TEXT}),'
    rf'"request":(null|{_TEXT}),"seq":([0-9]{{1,18}}),"hash":"([0-9a-f]{{64}})"\}}'
)
_FIRST_LINE = 1_000_000  # bytes that a manifest has at most
_BATCH = 5000


@dataclass(frozen=True)
class Checked:
    """A bundle that was verified: its manifest, what was found, and in words what its signature is worth."""

    manifest: dict[str, Any]
    verdict: Verdict
    signature: str


def write(
    ledger: Ledger,
    file: Path,
    form: Form,
    *,
    model: str | None = None,
    key: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the whole chain into `file` and return the manifest, which says whether it is about one `model`.

    `key` is the file of a private key that signs the manifest. The file is there whole or not at all. Raises
    AlreadyExists without `force`, UserError where it cannot be written or the key is none, NotFound for a model that
    is not there, AuditFailed where the chain is broken.
    """
    private = None if key is None else signing.read_private(key)
    if not force and file.exists():
        raise AlreadyExists(f"{file} exists already; give another --out, or --force")
    with ledger.audit.chain() as connection:
        head = chain.head(connection)
        about = None if model is None else {"name": model, "events": count_of(connection, model)}
        manifest = _manifest(head, about)
        if private is not None:
            manifest["signature"] = signing.sign(private, _signed(manifest))
        with _whole(file, force) as sink:
            {"jsonl": _write_jsonl, "parquet": _write_parquet}[form](sink, manifest, _sound(connection))
    return manifest


def verify(file: Path, public_key: Path | None = None, noted: ChainHead | None = None) -> Checked:
    """Check a bundle from its file alone; with `public_key`, that it is signed with that key.

    `noted` is a head that must be in its chain. Raises InvalidData where the file is no bundle.
    """
    started, findings = time.perf_counter(), Findings()
    try:
        with file.open("rb") as source:
            binary = source.read(4) == b"PAR1"
            source.seek(0)
            manifest, batches = _read_parquet(source, file) if binary else _read_jsonl(source, file, findings)
            count, head = 0, ChainHead(0, chain.GENESIS)
            for batch in chain.unbroken(batches, findings.chain, noted):
                count, head = count + len(batch), ChainHead(batch[-1][0], batch[-1][8])
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise InvalidData(f"bundle {file} cannot be read ({error.strerror})") from error
        raise AuditFailed(f"bundle {file} is cut short or damaged ({_first_line(error)})") from error
    expected = ChainHead(manifest["events"], manifest["head"])
    if count < expected.seq:
        findings.add(0, head.seq + 1, f"the bundle ends after event {head.seq} of {expected.seq}")
    elif head != expected:
        findings.chain(head.seq, f"the manifest names another head, {expected}")
    signature = _check_signature(manifest, public_key, findings)
    seconds = time.perf_counter() - started
    verdict = Verdict(count, head, 0, None, findings.count, findings.first, seconds)
    return Checked(manifest, verdict, signature)


def _manifest(head: ChainHead, about: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "bundle": _KIND,
        "format": FORMAT,
        "fsu_ray": importlib.metadata.version("fsu_ray"),
        "created_at": moment_text(now()),
        "events": head.seq,
        "head": head.hash,
        "model": about,
        "proves": list(PROVES),
        "proves_not": list(PROVES_NOT),
    }


@contextmanager
def _whole(file: Path, force: bool) -> Iterator[IO[bytes]]:
    """A new file under another name, which becomes `file` at the end of the block and is gone on any exception."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        if force:
            temporary.replace(file)
        else:
            os.link(temporary, file)  # which, unlike a move, never overwrites
    except FileExistsError:
        raise AlreadyExists(f"{file} exists already; give another --out, or --force") from None
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise UserError(f"{file} cannot be written ({reason}); give another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sound(connection: sa.Connection) -> Iterator[Sequence[Event]]:
    """The events on record; raises AuditFailed at their end where they are no chain."""
    findings = Findings()
    yield from chain.unbroken(chain.stored(connection), findings.chain)
    if findings.count:
        raise AuditFailed(f"{findings.first[0]}: no bundle was written; `fsu audit verify` says more")


def _write_jsonl(sink: IO[bytes], manifest: dict[str, Any], batches: Iterable[Sequence[Event]]) -> None:
    sink.write(f"{chain.canonical(manifest)}\n".encode())
    for batch in batches:
        sink.writelines(f'{Event(*row).line[:-1]},"hash":"{row[8]}"}}\n'.encode() for row in batch)
    sink.write(f"{chain.canonical(_end(manifest))}\n".encode())


def _write_parquet(sink: IO[bytes], manifest: dict[str, Any], batches: Iterable[Sequence[Event]]) -> None:
    schema = _SCHEMA.with_metadata({_METADATA: chain.canonical(manifest).encode()})
    with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        for batch in batches:
            columns = zip(schema, zip(*batch, strict=True), strict=True)
            arrays = [pa.array(values, field.type) for field, values in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _end(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"end": _KIND, "events": manifest["events"], "head": manifest["head"]}


def _read_jsonl(source: IO[bytes], file: Path, findings: Findings) -> tuple[dict[str, Any], Iterator[Sequence[Event]]]:
    manifest = _understood(source.readline(_FIRST_LINE), file)
    return manifest, _batches(_events(source, manifest, findings))


def _events(source: IO[bytes], manifest: dict[str, Any], findings: Findings) -> Iterator[Event]:
    """The events of a bundle in lines; what ends it too early is for its reader to see."""
    last = f"{chain.canonical(_end(manifest))}\n".encode()
    seq = 0
    for number, line in enumerate(source, 2):
        if line == last:
            if source.read(1):
                findings.add(0, seq + 1, "the bundle goes on after its end")
            return
        if not line.endswith(b"\n"):
            break
        event = _event(line)
        if event is None:
            findings.add(0, seq + 1, f"line {number} of the bundle is no event")
            continue
        seq = event.seq
        yield event
    if seq == manifest["events"]:
        findings.add(0, seq + 1, f"the bundle ends after event {seq} of {seq}, without its last line")


def _event(line: bytes) -> Event | None:
    try:
        found = _EVENT.fullmatch(line[:-1].decode("ascii"))
        if found is None:
            return None
        actor, at, detail, event, model, previous, request, seq, link = found.groups()
        who, when, what, of, before, asked = map(json.loads, (actor, at, event, model, previous, request))
        return Event(int(seq), when, what, of, asked, who, detail, before, link)
    except ValueError:  # not ASCII, or no JSON
        return None


def _batches(events: Iterable[Event]) -> Iterator[Sequence[Event]]:
    batch: list[Event] = []
    for event in events:
        batch.append(event)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_parquet(source: IO[bytes], file: Path) -> tuple[dict[str, Any], Iterator[Sequence[Event]]]:
    opened = parquet.ParquetFile(source)
    manifest = _understood((opened.schema_arrow.metadata or {}).get(_METADATA, b""), file)
    if opened.schema_arrow.remove_metadata() != _SCHEMA:
        raise AuditFailed(f"bundle {file} has other columns than {', '.join(Event._fields)}")
    return manifest, _rows(opened, file)


def _rows(opened: Any, file: Path) -> Iterator[Sequence[Event]]:
    for batch in opened.iter_batches(_BATCH):
        if batch.column(0).null_count:
            raise AuditFailed(f"bundle {file} has an event without a number")
        yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))  # type: ignore[arg-type]


def _understood(text: bytes, file: Path) -> dict[str, Any]:
    """The manifest in `text`; raises InvalidData where it is none, or of a newer format."""
    try:
        manifest = json.loads(text)
        if manifest["bundle"] != _KIND:
            raise KeyError(_KIND)
        if manifest["format"] != FORMAT:
            raise InvalidData(f"bundle {file} was written by a newer fsu_ray; upgrade fsu_ray")
        ChainHead.parse(f"{manifest['events']}:{manifest['head']}")
    except (ValueError, KeyError, TypeError, UserError) as error:
        if isinstance(error, InvalidData):
            raise
        raise InvalidData(f"{file} is no bundle of `fsu audit export`") from None
    return dict(manifest)


def _signed(manifest: dict[str, Any]) -> bytes:
    """What a signature is of: the manifest without it."""
    return chain.canonical({name: value for name, value in manifest.items() if name != "signature"}).encode()


def _check_signature(manifest: dict[str, Any], public_key: Path | None, findings: Findings) -> str:
    """Check the signature of a manifest; in words what it is worth."""
    trusted = None if public_key is None else signing.read_public(public_key)
    if "signature" not in manifest:
        if trusted is not None:
            findings.add(0, 0, "the manifest of the bundle is not signed")
        return "not signed"
    wrong = signing.check(manifest["signature"], _signed(manifest), trusted)
    if wrong is not None:
        findings.add(0, 0, f"the manifest of the bundle is {wrong}")
        return wrong
    return "signed with a key that only the bundle names" if trusted is None else "signed with the key given"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
