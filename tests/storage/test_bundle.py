"""Bundles: the chain as a file that is checked without the ledger, and the faults that the check reports."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fsu_ray.config import Timings
from fsu_ray.errors import AlreadyExists, AuditFailed, InvalidData, NotFound, UserError
from fsu_ray.storage import bundle
from fsu_ray.storage.chain import ChainHead
from fsu_ray.storage.ledger import Ledger, open_ledger

FORMS = ("jsonl", "parquet")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ledger, a key pair, and bundles of both forms, signed and unsigned."""
    folder = tmp_path_factory.mktemp("bundles")
    with open_ledger(f"sqlite:///{folder}/ledger.db") as ledger:
        fill(ledger)
        (folder / "public.pem").write_text(bundle.keygen(folder / "key.pem"))
        for form in FORMS:
            bundle.write(ledger, folder / f"a.{form}", form)
            bundle.write(ledger, folder / f"signed.{form}", form, key=folder / "key.pem", model="digits")
    return folder


def fill(ledger: Ledger) -> None:
    from fsu_ray.records import ModelSpec

    spec = ModelSpec(arch="lenet5", channels=1, height=32, width=32, classes=10)
    for name in ("digits", "other"):
        ledger.models.register(name, spec, hashlib.sha256(b"weights").hexdigest())
    for number in range(10):
        ledger.models.move_alias("digits", f"alias-{number}", 1, "u-1")


def findings(file: Path, *arguments: Any) -> tuple[str, ...]:
    return bundle.verify(file, *arguments).verdict.findings


def lines_of(written: Path) -> list[str]:
    return (written / "a.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_is_checked_without_the_ledger(written: Path, tmp_path: Path, form: str) -> None:
    file = tmp_path / "elsewhere"
    file.write_bytes((written / f"a.{form}").read_bytes())
    checked = bundle.verify(file)

    checked.verdict.check()
    assert (checked.verdict.events, checked.signature) == (14, "not signed")
    assert checked.manifest["events"] == 14
    assert checked.manifest["model"] is None
    said = " ".join(checked.manifest["proves"] + checked.manifest["proves_not"])
    for words in ("in their order", "approximate", "not a guarantee", "not altered", "what was written was true",
                  "cut off", "not the artifacts"):  # fmt: skip
        assert words in said
    assert findings(file, None, checked.verdict.head) == ()
    assert "hash that was noted" in findings(file, None, ChainHead(14, "0" * 64))[0]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("timings", [Timings(flush=3600.0)])
def test_both_forms_have_the_same_chain(driver: Any, tmp_path: Path) -> None:
    """On both engines, and with the steps that were waiting for the chain."""
    driver.erase()
    driver.submit("four", 4)
    driver.claim()
    for form in FORMS:
        bundle.write(driver.ledger, tmp_path / form, form)
    verdicts = [bundle.verify(tmp_path / form).verdict for form in FORMS]
    assert {(verdict.events, verdict.head, verdict.found) for verdict in verdicts} == {
        (driver.ledger.audit.verify().events, driver.ledger.audit.head(), 0)
    }


def test_a_line_can_be_checked_without_our_code(written: Path) -> None:
    """Cut the hash out of a line: the SHA-256 of the rest is that hash. Every line is JSON."""
    manifest, *events, end = lines_of(written)
    for line in events:
        cut = line.rstrip("\n").rindex(',"hash":')
        assert hashlib.sha256(f"{line[:cut]}}}".encode()).hexdigest() == json.loads(line)["hash"]
    assert json.loads(end)["head"] == json.loads(manifest)["head"] == json.loads(events[-1])["hash"]
    assert json.loads(end)["events"] == len(events)


def test_a_cut_file_is_reported(written: Path, tmp_path: Path) -> None:
    """After a line, inside a line, and just before the last one."""
    lines = lines_of(written)
    file = tmp_path / "cut.jsonl"
    for text, words in (
        ("".join(lines[:8]), "the bundle ends after event 7 of 14"),
        ("".join(lines[:8]) + lines[8][:100], "the bundle ends after event 7 of 14"),
        ("".join(lines[:8]) + lines[8][:-1], "the bundle ends after event 7 of 14"),
        (lines[0], "the bundle ends after event 0 of 14"),
        ("".join(lines[:-1]), "the bundle ends after event 14 of 14, without its last line"),
        ("".join(lines)[:-1], "the bundle ends after event 14 of 14, without its last line"),
        ("".join(lines) + lines[3], "the bundle goes on after its end"),
        ("".join([*lines[:7], lines[-1]]), "the bundle ends after event 6 of 14"),
    ):
        file.write_text(text)
        with pytest.raises(AuditFailed) as caught:
            bundle.verify(file).verdict.check()
        assert str(caught.value) == words
    data = (written / "a.parquet").read_bytes()
    for size in (len(data) // 2, len(data) - 1, 5):
        file.write_bytes(data[:size])
        with pytest.raises(AuditFailed, match="is cut short or damaged"):
            bundle.verify(file)


def test_a_changed_line_is_reported(written: Path, tmp_path: Path) -> None:
    lines = lines_of(written)
    file = tmp_path / "changed.jsonl"
    changes: list[tuple[list[str], str]] = [
        ([*lines[:5], lines[5].replace("u-1", "u-2"), *lines[6:]], "audit_events 5: its hash is not that of"),
        ([*lines[:5], *lines[6:]], "audit_events 5: missing, 6 comes after 4"),
        ([*lines[:5], lines[6], lines[5], *lines[7:]], "audit_events 5: missing, 6 comes after 4"),
        ([*lines[:5], lines[5], *lines[5:]], "audit_events 6: missing, 5 comes after 5"),
        ([*lines[:5], "{}\n", *lines[6:]], "line 6 of the bundle is no event"),
        ([*lines[:5], "é\n", *lines[6:]], "line 6 of the bundle is no event"),
        ([lines[0].replace('"events":14', '"events":13'), *lines[1:]], "audit_events 14: the manifest names another"),
        ([lines[0].replace('"head":"', '"head":"0')[:-70], *lines[1:]], "is no bundle"),
    ]
    for changed, words in changes:
        file.write_text("".join(changed))
        with pytest.raises((AuditFailed, InvalidData), match=words):
            bundle.verify(file).verdict.check()


def test_a_changed_table_is_reported(written: Path, tmp_path: Path) -> None:
    table = parquet.read_table(written / "a.parquet")
    file = tmp_path / "changed.parquet"

    def verdict(changed: pa.Table) -> str:
        parquet.write_table(changed, file)
        with pytest.raises(AuditFailed) as caught:
            bundle.verify(file).verdict.check()
        return str(caught.value)

    actors = pa.array(["u-2", *table["actor"].to_pylist()[1:]])
    place = table.schema.get_field_index("actor")
    assert verdict(table.set_column(place, "actor", actors)) == "audit_events 1: its hash is not that of its content"
    assert verdict(table.slice(0, 9)) == "the bundle ends after event 9 of 14"
    assert verdict(table.slice(2)).startswith("audit_events 1: missing, 3 comes after 0")
    assert "has other columns" in verdict(table.drop_columns(["actor"]))
    numbers = pa.array([None, *range(2, 15)], pa.int64())
    assert "without a number" in verdict(table.set_column(0, "seq", numbers))


@pytest.mark.parametrize("form", FORMS)
def test_a_signature_is_checked_by_the_key_of_the_caller(written: Path, tmp_path: Path, form: str) -> None:
    file, public = written / f"signed.{form}", written / "public.pem"
    checked = bundle.verify(file)
    assert (checked.verdict.found, checked.signature) == (0, "signed with a key that only the bundle names")
    assert checked.manifest["model"] == {"name": "digits", "events": 12}
    assert bundle.verify(file, public).signature == "signed with the key given"
    assert findings(written / f"a.{form}", public) == ("the manifest of the bundle is not signed",)
    (tmp_path / "other.pem").write_text(bundle.keygen(tmp_path / "k.pem"))
    assert findings(file, tmp_path / "other.pem") == (
        "the manifest of the bundle is signed with another key than the one given",
    )


def test_a_signature_is_of_the_whole_manifest(written: Path, tmp_path: Path) -> None:
    """So a manifest with a changed head needs a new signature."""
    first, *rest = (written / "signed.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "shorter.jsonl"
    manifest = json.loads(first)
    for change in (
        {"created_at": "2020-01-01"},
        {"proves": ["Everything."]},
        {"signature": None},
        {"signature": {**manifest["signature"], "signature": "AAAA"}},
        {"signature": {**manifest["signature"], "public_key": "nonsense"}},
    ):
        file.write_text("".join([json.dumps(manifest | change) + "\n", *rest]))
        assert findings(file) == ("the manifest of the bundle is not what was signed",)
    events = rest[:9]
    shorter = {"events": 9, "head": json.loads(events[-1])["hash"]}
    end = json.loads(rest[-1]) | shorter
    text = [json.dumps(manifest | shorter) + "\n", *events, json.dumps(end, separators=(",", ":")) + "\n"]
    file.write_text("".join(text))
    assert findings(file) == ("the manifest of the bundle is not what was signed",)
    unsigned = {name: value for name, value in (manifest | shorter).items() if name != "signature"}
    file.write_text("".join([json.dumps(unsigned) + "\n", *text[1:]]))
    assert findings(file) == ()  # what the manifest says it does not prove
    assert findings(file, written / "public.pem") == ("the manifest of the bundle is not signed",)
    assert findings(file, None, ChainHead(manifest["events"], manifest["head"])) != ()


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"bundle":"fsu_ray audit bundle"}\n']
)
def test_a_file_that_is_no_bundle(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(InvalidData, match="is no bundle of `fsu audit export`"):
        bundle.verify(file)


def test_files_that_cannot_be_read(written: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InvalidData, match="cannot be read"):
            bundle.verify(place)
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InvalidData, match="is no bundle"):
        bundle.verify(tmp_path / "other.parquet")
    newer = lines_of(written)
    newer[0] = newer[0].replace('"format":1', '"format":2')
    (tmp_path / "newer").write_text("".join(newer))
    with pytest.raises(InvalidData, match="newer fsu_ray"):
        bundle.verify(tmp_path / "newer")
    for wrong in ("key.pem", "a.jsonl", "nowhere"):
        with pytest.raises(UserError, match=r"no Ed25519 public key|cannot be read"):
            bundle.verify(written / "signed.jsonl", written / wrong)


def test_a_bundle_is_whole_or_absent(driver: Any, raw: Any, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("mine")
    ledger = driver.ledger
    with pytest.raises(AlreadyExists, match="--force"):
        bundle.write(ledger, file, "jsonl")
    with pytest.raises(NotFound, match="no model 'x'"):
        bundle.write(ledger, file, "jsonl", model="x", force=True)
    with pytest.raises(UserError, match="no Ed25519 private key"):
        bundle.write(ledger, file, "jsonl", key=file, force=True)
    with pytest.raises(UserError, match="cannot be written"):
        bundle.write(ledger, tmp_path / "no folder" / "a", "jsonl")
    monkeypatch.setattr(bundle, "_end", lambda manifest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bundle.write(ledger, file, "jsonl", force=True)
    monkeypatch.undo()
    assert file.read_text() == "mine"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "exists", lambda self: False)  # another process makes it in this very moment
        with pytest.raises(AlreadyExists):
            bundle.write(ledger, file, "jsonl")
    assert file.read_text() == "mine"
    bundle.write(ledger, file, "jsonl", force=True)
    assert findings(file) == ()
    name = "audit_events_update"
    raw.execute(f"DROP TRIGGER {name}" + ("" if raw.engine == "sqlite" else " ON audit_events"))
    raw.execute("UPDATE audit_events SET actor = 'x' WHERE seq = 1")
    for form in FORMS:
        with pytest.raises(AuditFailed, match=r"audit_events 1: its hash .* no bundle was written"):
            bundle.write(ledger, tmp_path / "b", form)
    assert [each.name for each in tmp_path.iterdir() if not each.name.startswith("ledger.db")] == ["a.jsonl"]


def test_only_the_owner_may_read_a_private_key(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    public = bundle.keygen(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert public.startswith("-----BEGIN PUBLIC KEY-----\n")
    before = file.read_bytes()
    with pytest.raises(AlreadyExists, match="never overwritten"):
        bundle.keygen(file)
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        bundle.keygen(tmp_path / "no folder" / "key.pem")


def test_an_empty_ledger_has_a_bundle(ledger: Ledger, tmp_path: Path) -> None:
    for form in FORMS:
        bundle.write(ledger, tmp_path / form, form)
        assert bundle.verify(tmp_path / form).verdict.events == 0
