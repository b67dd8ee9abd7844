"""`fsu audit`: whether history is as it was written, and copies of it for others."""

from __future__ import annotations

import json as json_
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fsu_ray import console
from fsu_ray.cli.shared import Json, OneModel, one_line
from fsu_ray.errors import UserError
from fsu_ray.records import Status
from fsu_ray.service import Service, connect

if TYPE_CHECKING:
    from fsu_ray.storage.audit import Verdict
    from fsu_ray.storage.chain import Event

audit_app = typer.Typer(help="Verify and export the audit chain.", no_args_is_help=True)


class Form(StrEnum):
    """How a bundle is written."""

    JSONL = "jsonl"
    PARQUET = "parquet"


@audit_app.command("verify", epilog="Example: fsu audit verify --head 812:9f2c...")
@one_line
def audit_verify(
    artifacts: Annotated[
        bool, typer.Option("--artifacts/--no-artifacts", help="Compare the content of every artifact with its digest.")
    ] = True,
    head: Annotated[str | None, typer.Option(help="SEQ:HASH, noted earlier: the chain must still contain it.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Verify this exported file alone, without a ledger.")] = None,
    public_key: Annotated[Path | None, typer.Option(help="The bundle must be signed with this key (PEM).")] = None,
    json: Json = False,
) -> None:
    """Recompute the audit chain, and compare the ledger and its artifacts with it.

    Exit code 0: all is as it was written. 3: it is not; the first difference is named.
    """
    if public_key is not None and bundle is None:
        raise UserError("--public-key goes with --bundle")
    more: dict[str, Any] = {}
    if bundle is None:
        verdict = connect().audit.verify(artifacts, head)
    else:
        checked = Service().audit.verify_bundle(bundle, public_key, head)
        verdict = checked.verdict
        more = {"signature": checked.signature, "manifest": checked.manifest}
    if json:
        console.print_json(vars(verdict) | {"head": str(verdict.head), "good": not verdict.found} | more)
    verdict.check()
    if not json:
        _print_verdict(verdict, more)


def _print_verdict(verdict: Verdict, more: Mapping[str, Any]) -> None:
    looked = "no artifacts" if verdict.artifacts is None else f"{verdict.artifacts} artifacts"
    console.out.print(
        f"[green]good[/]: {verdict.events} events and {looked} are as they were written ({verdict.seconds:.2f} s)"
    )
    if verdict.waiting:
        console.out.print(f"{verdict.waiting} steps of requests are not in the chain yet")
    console.out.print(f"head {verdict.head}")
    if more:
        manifest = more["manifest"]
        about = manifest.get("model")
        which = f", {about['events']} of them of {about['name']}" if about else ""
        console.out.print(
            f"bundle of fsu_ray {manifest['fsu_ray']}, {manifest['created_at']}, {manifest['events']} events{which}: "
            f"{more['signature']}"
        )
        for title, sentences in (("it proves", manifest["proves"]), ("it does not prove", manifest["proves_not"])):
            console.out.print(f"{title}:")
            for sentence in sentences:
                console.out.print(f"  - {sentence}", markup=False)


@audit_app.command("export", epilog="Example: fsu audit export --format jsonl --out audit.jsonl --key key.pem")
@one_line
def audit_export(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    form: Annotated[Form, typer.Option("--format", help="Lines of JSON, or a Parquet table.")] = Form.JSONL,
    model: Annotated[
        str | None, typer.Option(help="What the file is about; it holds the whole chain all the same.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Sign it with this private key (PEM).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: Json = False,
) -> None:
    """Write the whole audit chain into a file that `fsu audit verify --bundle` verifies without the ledger."""
    manifest = connect().audit.export(out, form.value, model=model, key=key, force=force)
    if json:
        console.print_json(manifest)
    else:
        signed = "signed" if "signature" in manifest else "not signed"
        console.out.print(f"{out}: {manifest['events']} events, {signed}, head {manifest['events']}:{manifest['head']}")


@audit_app.command("keygen", epilog="Example: fsu audit keygen --out key.pem > key.pub.pem")
@one_line
def audit_keygen(out: Annotated[Path, typer.Option(help="A new file for the private key.")]) -> None:
    """Make a key to sign exported files with, and print its public part."""
    typer.echo(Service().audit.keygen(out), nl=False)


@audit_app.command("head", epilog="Example: fsu audit head")
@one_line
def audit_head(json: Json = False) -> None:
    """Print the number and the hash of the last event. Noted elsewhere, they show later that nothing was cut off."""
    head = connect().audit.head()
    if json:
        console.print_json({"seq": head.seq, "hash": head.hash})
    else:
        console.out.print(str(head))


@audit_app.command("log", epilog="Example: fsu audit log --model digits-demo --last 20")
@one_line
def audit_log(
    model: OneModel = None,
    request: Annotated[
        str | None, typer.Option(help="Only of this request; the beginning of its id is enough.")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only the latest ones, this many. Default: all.")] = None,
    json: Json = False,
) -> None:
    """Show the events of the audit chain in words, oldest first."""
    events = connect().audit.log(model, request, last)
    if json:
        console.print_json([event._asdict() | {"detail": _detail(event)} for event in events])
        return
    rows = [
        [e.seq, *map(escape, (e.at[:19], e.model or "", e.request or "", e.actor, words(e.event, _detail(e))))]
        for e in events
    ]
    console.out.print(console.table("Audit log", ["event", "at (UTC)", "model", "request", "by", "what"], rows))


def _detail(event: Event) -> dict[str, Any]:
    """The detail of an event; empty where somebody has changed it so that it does not parse."""
    try:
        detail = json_.loads(event.detail)
    except ValueError:
        return {}
    return detail if isinstance(detail, dict) else {}


def words(event: str, detail: Mapping[str, Any]) -> str:
    """What happened, for people."""
    row = detail.get("row", {})
    try:
        return _WORDS[event](row)
    except (KeyError, TypeError):  # an event of a newer fsu_ray
        return f"{event.replace('_', ' ')} {row.get('id', '')}".strip()


def _classes(row: Mapping[str, Any]) -> str:
    targets = row["behaviour_targets"]
    return f"{row['behaviour_name']} ({row['behaviour_kind']} {' '.join(map(str, targets))})"


def _step(row: Mapping[str, Any]) -> str:
    old = f"from {row['old']} " if row["old"] else ""
    reason = f": {row['reason']}" if row["reason"] else ""
    return f"request {old}to {row['new']}, attempt {row['attempt']}{reason}"


def _moved(row: Mapping[str, Any]) -> str:
    before = "" if row["previous"] is None else f" from version {row['previous']}"
    return f"alias {row['alias']}{before} to version {row['version']}{' by force' if row['forced'] else ''}"


def _rechecked(row: Mapping[str, Any]) -> str:
    share = "nothing to measure" if row["share"] is None else f"{100 * row['share']:.2f} % of {row['probes']} probes"
    return f"re-check {'passed' if row['passed'] else 'failed'} on version {row['version']}: {share}"


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "registered": lambda row: f"model registered: {row['spec']['arch']}, {row['spec']['classes']} classes",
    "version_added": lambda row: f"version {row['number']}, weights {row['weights'][:12]}",
    "policy_set": lambda row: "policy: " + ", ".join(f"{k} {v}" for k, v in row["policy"].items() if v is not None),
    "submitted": lambda row: f"asked to erase {_classes(row)}, {row['sample_count']} samples",
    "generator_trained": lambda row: f"generator {row['id']} trained on version {row['root']}",
    "generator_warm_started": lambda row: f"generator {row['id']} trained from {row['warm_started_from']}",
    "generator_transferred": lambda row: f"generator {row['id']} with the weights of {row['transferred_from']}",
    "generator_imported": lambda row: f"generator {row['id']} imported, D' labelled by version {row['root']}",
    "generator_retired": lambda row: f"generator {row['generator_id']} retired: {row['reason']}",
    "erased": lambda row: f"erased {_classes(row)} as of version {row['version']}",
    "recheck_passed": _rechecked,
    "recheck_failed": _rechecked,
    "alias_moved": _moved,
    "sealed": lambda row: f"generator {row['generator_id']} sealed as of version {row['version']}",
    "recipe_found": lambda row: f"recipe of search {row['id']} for {row['kind']} requests, score {row['score']:.4g}",
    "recipe_reset": lambda row: f"{row['kind']} requests take a preset again",
    "removed": lambda row: f"artifact {row['digest'][:12]} {row['reason']}",
    "schedule_added": lambda row: f"schedule {row['id']}: {row['cron']} in {row['timezone']}",
    "schedule_active": lambda row: f"schedule {row['schedule_id']} active",
    "schedule_paused": lambda row: f"schedule {row['schedule_id']} paused",
    "schedule_removed": lambda row: f"schedule {row['schedule_id']} removed",
    "window_fired": lambda row: f"schedule {row['schedule_id']}: window of {row['starts_at'][:16]}",
    **{f"request_{status.value}": _step for status in Status},
}
