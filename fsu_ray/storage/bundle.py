"""The audit chain as a file that can be checked without the ledger, and the keys that sign it.

A bundle has the whole chain, since a part of a chain proves nothing, and a manifest that says what the bundle proves
and what it does not. In the form `jsonl` the first line is the manifest and the last line gives the number of events
and the head; each line between is an event: canonical JSON, at its end `hash`, the SHA-256 of the line without that
member. In the form `parquet` it is a table of the events with the manifest in its metadata. The manifest, and with it
the head of the chain, may be signed with an Ed25519 key in PEM; keys and signatures need cryptography, the extra
`audit`.
"""

from __future__ import annotations

import base64
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

from fsu_ray.errors import AlreadyExists, AuditFailed, InvalidConfig, InvalidData, UserError
from fsu_ray.storage import chain
from fsu_ray.storage.audit import Findings, Verdict, count_of
from fsu_ray.storage.chain import ChainHead, Event
from fsu_ray.storage.columns import moment_text
from fsu_ray.storage.ledger import Ledger
from fsu_ray.storage.rows import now

Form = Literal["jsonl", "parquet"]

FORMAT = 1
"""The version of the file format of bundles."""

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
_MAX_MANIFEST = 1_000_000  # bytes
_BATCH = 5000  # events read at once


@dataclass(frozen=True)
class Checked:
    """A bundle that was verified: its manifest, the verdict, and in words whether and by which key it is signed."""

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
    """Write the whole chain into `file`, whole or not at all; the manifest, which names `model` if the bundle is about
    one.

    `key` is the file of the private key that signs the manifest. Raises AlreadyExists where the file exists, without
    `force`; UserError where it cannot be written or the key is no private key; NotFound for an unknown model;
    AuditFailed where the chain is broken.
    """
    private = None if key is None else read_private_key(key)
    if not force and file.exists():
        raise AlreadyExists(f"{file} exists already; give another --out, or --force")
    with ledger.audit.snapshot() as connection:
        head = chain.head(connection)
        about = None if model is None else {"name": model, "events": count_of(connection, model)}
        manifest = _manifest(head, about)
        if private is not None:
            manifest["signature"] = sign(private, _signed_text(manifest))
        with _atomic(file, force) as sink:
            {"jsonl": _write_jsonl, "parquet": _write_parquet}[form](sink, manifest, _checked_events(connection))
    return manifest


def verify(file: Path, public_key: Path | None = None, noted: ChainHead | None = None) -> Checked:
    """Check a bundle by its file alone; with `public_key`, also that it is signed with that key.

    `noted` is a head that must be in its chain. Raises InvalidData where the file is no bundle, AuditFailed where it is
    damaged.
    """
    started, findings = time.perf_counter(), Findings()
    try:
        with file.open("rb") as source:
            is_parquet = source.read(4) == b"PAR1"
            source.seek(0)
            manifest, batches = _read_parquet(source, file) if is_parquet else _read_jsonl(source, file, findings)
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
def _atomic(file: Path, force: bool) -> Iterator[IO[bytes]]:
    """A temporary file that becomes `file` at the end of the block and is deleted on any exception."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        if force:
            temporary.replace(file)
        else:
            os.link(temporary, file)  # unlike a move, this never overwrites
    except FileExistsError:
        raise AlreadyExists(f"{file} exists already; give another --out, or --force") from None
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise UserError(f"{file} cannot be written ({reason}); give another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _checked_events(connection: sa.Connection) -> Iterator[Sequence[Event]]:
    """The stored events; raises AuditFailed at their end where their chain is broken."""
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
    manifest = _parse_manifest(source.readline(_MAX_MANIFEST), file)
    return manifest, _batches(_events(source, manifest, findings))


def _events(source: IO[bytes], manifest: dict[str, Any], findings: Findings) -> Iterator[Event]:
    """The events of a `jsonl` bundle. The caller checks whether it ends too early."""
    last = f"{chain.canonical(_end(manifest))}\n".encode()
    seq = 0
    for number, line in enumerate(source, 2):
        if line == last:
            if source.read(1):
                findings.add(0, seq + 1, "the bundle goes on after its end")
            return
        if not line.endswith(b"\n"):
            break
        event = _parse_event(line)
        if event is None:
            findings.add(0, seq + 1, f"line {number} of the bundle is no event")
            continue
        seq = event.seq
        yield event
    if seq == manifest["events"]:
        findings.add(0, seq + 1, f"the bundle ends after event {seq} of {seq}, without its last line")


def _parse_event(line: bytes) -> Event | None:
    try:
        match = _EVENT.fullmatch(line[:-1].decode("ascii"))
        if match is None:
            return None
        actor, at, detail, event, model, previous, request, seq, own_hash = match.groups()
        actor, at, event, model, previous, request = map(json.loads, (actor, at, event, model, previous, request))
        return Event(int(seq), at, event, model, request, actor, detail, previous, own_hash)
    except ValueError:  # not ASCII, or invalid JSON
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
    manifest = _parse_manifest((opened.schema_arrow.metadata or {}).get(_METADATA, b""), file)
    if opened.schema_arrow.remove_metadata() != _SCHEMA:
        raise AuditFailed(f"bundle {file} has other columns than {', '.join(Event._fields)}")
    return manifest, _rows(opened, file)


def _rows(opened: Any, file: Path) -> Iterator[Sequence[Event]]:
    for batch in opened.iter_batches(_BATCH):
        if batch.column(0).null_count:
            raise AuditFailed(f"bundle {file} has an event without a number")
        yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))  # type: ignore[arg-type]


def _parse_manifest(text: bytes, file: Path) -> dict[str, Any]:
    """The manifest in `text`; raises InvalidData where it is no manifest, or of a newer format."""
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


def _signed_text(manifest: dict[str, Any]) -> bytes:
    """The bytes that are signed: the manifest without its signature."""
    return chain.canonical({name: value for name, value in manifest.items() if name != "signature"}).encode()


def _check_signature(manifest: dict[str, Any], public_key: Path | None, findings: Findings) -> str:
    """Check the signature of a manifest; in words whether and by which key it is signed."""
    trusted = None if public_key is None else read_public_key(public_key)
    if "signature" not in manifest:
        if trusted is not None:
            findings.add(0, 0, "the manifest of the bundle is not signed")
        return "not signed"
    fault = _signature_fault(manifest["signature"], _signed_text(manifest), trusted)
    if fault is not None:
        findings.add(0, 0, f"the manifest of the bundle is {fault}")
        return fault
    return "signed with a key that only the bundle names" if trusted is None else "signed with the key given"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Keys and signatures.


def keygen(file: Path) -> str:
    """Write a new private key into `file`, readable by its owner only; the public key, in PEM. Never overwrites."""
    serialization, ed25519 = _cryptography()
    private = ed25519.Ed25519PrivateKey.generate()
    text = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"{file} exists already; a key is never overwritten") from None
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); give another --out") from error
    with os.fdopen(descriptor, "wb") as sink:
        sink.write(text)
    return _pem(private.public_key())


def read_private_key(file: Path) -> Any:
    """The private key in a file; raises UserError."""
    serialization, ed25519 = _cryptography()
    key = _load_key(file, lambda text: serialization.load_pem_private_key(text, None))
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(f"{file} is no Ed25519 private key in PEM; `fsu audit keygen` makes one")
    return key


def read_public_key(file: Path) -> Any:
    """The public key in a file; raises UserError."""
    serialization, ed25519 = _cryptography()
    key = _load_key(file, serialization.load_pem_public_key)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UserError(f"{file} is no Ed25519 public key in PEM; `fsu audit keygen` prints one")
    return key


def sign(private: Any, text: bytes) -> dict[str, str]:
    """The signature of `text`, with the public key that checks it."""
    signature = base64.b64encode(private.sign(text)).decode()
    return {"algorithm": "Ed25519", "public_key": _pem(private.public_key()), "signature": signature}


def _signature_fault(signature: Any, text: bytes, trusted: Any = None) -> str | None:
    """What is wrong with a signature of `text`, in words; None where it is valid, and made by the key `trusted` if
    given."""
    serialization, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        key = serialization.load_pem_public_key(signature["public_key"].encode())
        key.verify(base64.b64decode(signature["signature"], validate=True), text)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, KeyError, TypeError, AttributeError):
        return "not what was signed"
    return None if trusted is None or _pem(key) == _pem(trusted) else "signed with another key than the one given"


def _load_key(file: Path, load: Any) -> Any:
    """The key that `load` reads from a file, None where it cannot."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(file.read_bytes())
    except OSError as error:
        raise UserError(f"key {file} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def _pem(public: Any) -> str:
    serialization, _ = _cryptography()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(public.public_bytes(serialization.Encoding.PEM, form).decode())


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise InvalidConfig("keys and signatures need cryptography: pip install 'fsu_ray[audit]'") from None
    return serialization, ed25519
