"""`fsu audit`: whether history is what it was, and a copy of it for others."""

from __future__ import annotations

import json as json_
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fsu_ray import console
from fsu_ray.cli.shared import Json, one_line, open_app
from fsu_ray.errors import UserError
from fsu_ray.records import Status

audit_app = typer.Typer(help="Audit: whether history is what it was.", no_args_is_help=True)


class Form(StrEnum):
    """How a bundle is written."""

    JSONL = "jsonl"
    PARQUET = "parquet"


@audit_app.command("verify", epilog="Example: fsu audit verify --head 812:9f2c...")
@one_line
def audit_verify(
    artifacts: Annotated[bool, typer.Option("--artifacts/--no-artifacts", help="Read every artifact too.")] = True,
    head: Annotated[str | None, typer.Option(help="SEQ:HASH, noted earlier: must still be in the chain.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Check this file alone, and no ledger.")] = None,
    public_key: Annotated[Path | None, typer.Option(help="The bundle must be signed with this key (PEM).")] = None,
    json: Json = False,
) -> None:
    """Recompute the audit chain, and compare the ledger and its artifacts with it.

    Exit code 0: all is as it was written; 3: it is not, and the first thing that is wrong is named.
    """
    from fsu_ray.storage.chain import ChainHead

    if public_key is not None and bundle is None:
        raise UserError("--public-key goes with --bundle")
    noted = None if head is None else ChainHead.parse(head)
    more: dict[str, Any] = {}
    if bundle is None:
        opened = open_app()
        verdict = opened.ledger.audit.verify(opened.artifacts if artifacts else None, noted)
        if not verdict.events + verdict.found:
            raise UserError("the ledger is empty: there is nothing to verify; check FSU_LEDGER and FSU_HOME")
    else:
        from fsu_ray.storage.bundle import verify

        checked = verify(bundle, public_key, noted)
        verdict = checked.verdict
        more = {"signature": checked.signature, "manifest": checked.manifest}
    if json:
        console.print_json(vars(verdict) | {"head": str(verdict.head), "good": not verdict.found} | more)
    verdict.check()
    if not json:
        _print_verdict(verdict, more)


def _print_verdict(verdict: Any, more: Mapping[str, Any]) -> None:
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
        for title, lines in (("it proves", manifest["proves"]), ("it does not prove", manifest["proves_not"])):
            console.out.print(f"{title}:")
            for line in lines:
                console.out.print(f"  - {line}", markup=False)


@audit_app.command("export", epilog="Example: fsu audit export --format jsonl --out audit.jsonl --key key.pem")
@one_line
def audit_export(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    form: Annotated[Form, typer.Option("--format", help="Lines of JSON, or a table.")] = Form.JSONL,
    model: Annotated[str | None, typer.Option(help="What the bundle is about; it has the whole chain anyway.")] = None,
    key: Annotated[Path | None, typer.Option(help="Sign it with this private key (PEM).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: Json = False,
) -> None:
    """Write the whole audit chain into a file that `fsu audit verify --bundle` checks without the ledger."""
    from fsu_ray.storage.bundle import write

    manifest = write(open_app().ledger, out, form.value, model=model, key=key, force=force)
    if json:
        console.print_json(manifest)
    else:
        signed = "signed" if "signature" in manifest else "not signed"
        console.out.print(f"{out}: {manifest['events']} events, {signed}, head {manifest['events']}:{manifest['head']}")


@audit_app.command("keygen", epilog="Example: fsu audit keygen --out key.pem > key.pub.pem")
@one_line
def audit_keygen(out: Annotated[Path, typer.Option(help="Where the private key is to be; nothing there yet.")]) -> None:
    """Make a key to sign bundles with, and print its public part."""
    from fsu_ray.storage.bundle import keygen

    typer.echo(keygen(out), nl=False)


@audit_app.command("head", epilog="Example: fsu audit head")
@one_line
def audit_head(json: Json = False) -> None:
    """The last event's number and hash: noted elsewhere, they show later that nothing was cut off."""
    found = open_app().ledger.audit.head()
    if json:
        console.print_json({"seq": found.seq, "hash": found.hash})
    else:
        console.out.print(str(found))


@audit_app.command("log", epilog="Example: fsu audit log --model digits-demo --last 20")
@one_line
def audit_log(
    model: Annotated[str | None, typer.Option(help="Only events of this model.")] = None,
    request: Annotated[str | None, typer.Option(help="Only events of this request; the beginning is enough.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only so many of the latest. Default: all.")] = None,
    json: Json = False,
) -> None:
    """The events of the audit chain in words, oldest first."""
    events = open_app().ledger.audit.log(model, request, last)
    if json:
        console.print_json([each._asdict() | {"detail": _detail(each)} for each in events])
        return
    rows = [
        [e.seq, *map(escape, (e.at[:19], e.model or "", e.request or "", e.actor, words(e.event, _detail(e))))]
        for e in events
    ]
    console.out.print(console.table("Audit log", ["event", "at (UTC)", "model", "request", "by", "what"], rows))


def _detail(event: Any) -> dict[str, Any]:
    """What an event is about; empty where it has been tampered with so that it does not parse."""
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
