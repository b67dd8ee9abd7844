"""kuberay.yaml: fields that the CRDs of KubeRay have, one image and version of Ray, no secret, commands that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from cronsim import CronSim, CronSimError

from fsu_ray.cli import app
from fsu_ray.cluster import template

ROOT = Path(__file__).parent.parent

# The keys that KubeRay's Go types have, ray-operator/apis/ray/v1; the API server drops others without a word.
KEYS = {
    "RayJob": {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
        "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode",
        "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
    },
    "RayCronJob": {"schedule", "jobTemplate", "suspend"},
    "RayCluster": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
        "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "workerGroupSpecs",
    },
    "head": {"enableIngress", "headService", "rayStartParams", "serviceType", "template"},
    "group": {
        "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
        "scaleStrategy", "suspend", "template",
    },
}  # fmt: skip


def manifests(text: str) -> dict[str, Any]:
    """The manifests of a file by kind; those in a List are taken out of it."""
    documents = [
        manifest
        for document in yaml.safe_load_all(text)
        for manifest in (document["items"] if document["kind"] == "List" else [document])
    ]
    return {manifest["kind"]: manifest for manifest in documents}


def faults(text: str) -> list[str]:
    """What is wrong with the manifests of `text`, a line manifest."""
    problems = list(template.secrets(text))
    by_kind = manifests(text)
    if missing := {"RayJob", "RayCronJob"} - by_kind.keys():
        return [*problems, f"there is no {' and no '.join(sorted(missing))}"]
    for kind, manifest in by_kind.items():
        if manifest["apiVersion"] != "ray.io/v1" or not re.fullmatch(
            r"[a-z][a-z0-9-]{0,40}", manifest["metadata"]["name"]
        ):
            problems.append(f"{kind}: apiVersion or name")
        problems += [f"{kind}: there is no field {key}" for key in manifest["spec"].keys() - KEYS[kind]]
    cron = by_kind["RayCronJob"]["spec"]
    try:
        next(CronSim(str(cron.get("schedule")), datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        problems.append(f"RayCronJob: schedule: {error}")
    if not isinstance(cron.get("suspend", False), bool):
        problems.append("RayCronJob: suspend is not true or false")
    nightly = cron.get("jobTemplate", {})
    problems += [f"RayCronJob: jobTemplate has no field {key}" for key in nightly.keys() - KEYS["RayJob"]]
    for job in (by_kind["RayJob"]["spec"], nightly):
        problems += _job(job)
    return problems


def _job(job: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one job's specification."""
    program, command, *arguments = job.get("entrypoint", "nothing given").split()
    try:
        typer.main.get_command(app).commands[command].make_context(command, arguments)  # type: ignore[attr-defined]
    except Exception as error:
        yield f"entrypoint {program} {command}: {error}"
    if program != "fsu":
        yield f"entrypoint: {program} is no command of the image"
    if not job.get("shutdownAfterJobFinishes") or not job.get("activeDeadlineSeconds"):
        yield "shutdownAfterJobFinishes, activeDeadlineSeconds: a cluster that costs money for ever"
    cluster = job.get("rayClusterSpec", {"headGroupSpec": {}, "workerGroupSpecs": []})
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    yield from (f"rayClusterSpec has no field {key}" for key in cluster.keys() - KEYS["RayCluster"])
    yield from (f"headGroupSpec has no field {key}" for key in head.keys() - KEYS["head"])
    yield from (f"workerGroupSpecs has no field {key}" for group in groups for key in group.keys() - KEYS["group"])
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "authOptions: the cluster has no token"
    ray = re.search(r"ray\[default,train,tune\]==([\d.]+)", (ROOT / "cluster.yaml").read_text())
    assert ray
    pods = [group.get("template", {}).get("spec", {"containers": [{}]}) for group in (head, *groups)]
    images = {pod["containers"][0].get("image", "") for pod in pods}
    if len(images) != 1 or not next(iter(images)).endswith(f":{ray[1]}") or cluster.get("rayVersion") != ray[1]:
        yield f"image and rayVersion: all are to be of Ray {ray[1]}, as in cluster.yaml"
    if {pod.get("serviceAccountName") for pod in pods} != {"fsu"}:
        yield "serviceAccountName: the bucket is opened by the service account, of head and workers"
    yield from _pods(pods[0], groups)


def _pods(head: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with what the pods find, and with what they take."""
    environment = {each["name"]: each for each in head["containers"][0].get("env", ())}
    if not re.match("(s3|gs)://", environment.get("FSU_ARTIFACTS", {}).get("value", "")):
        yield "FSU_ARTIFACTS: no bucket on the head"
    reference = environment.get("FSU_LEDGER", {}).get("valueFrom", {}).get("secretKeyRef", {})
    if reference.keys() != {"name", "key"}:
        yield "FSU_LEDGER: not from a Secret"
    for group in groups:
        container = group["template"]["spec"]["containers"][0]
        if "FSU_LEDGER" in str(container.get("env")):
            yield "FSU_LEDGER: workers never open the ledger"
        if not container["resources"]["limits"].get("nvidia.com/gpu"):
            yield "a worker without a GPU"
        if not 1 <= group.get("replicas", 0) <= group.get("maxReplicas", 2**31) <= 64:
            yield "replicas: 1 to maxReplicas, which is stated"


@pytest.fixture(scope="module")
def file() -> str:
    return (ROOT / "fsu_ray" / "cluster" / "kuberay.yaml").read_text()


def test_the_file_has_both_manifests_and_no_fault(file: str) -> None:
    assert faults(file) == []


BROKEN = {
    "no nightly one": ("kind: RayCronJob", "kind: ConfigMap", "there is no RayCronJob"),
    "another API": ("ray.io/v1\n    kind: RayJob", "ray.io/v1alpha1\n    kind: RayJob", "RayJob: apiVersion"),
    "a name that is none": ("fsu-nightly", "Fsu_nightly", "RayCronJob: apiVersion or name"),
    "a field of CronJob": ("suspend: false", "concurrencyPolicy: Forbid", "RayCronJob: there is no field concurrency"),
    "a spec too many": ("jobTemplate: *drain", "jobTemplate: {spec: *drain}", "jobTemplate has no field spec"),
    "no such hour": ('"0 2 * * *"', '"0 25 * * *"', "RayCronJob: schedule"),
    "a word": ("suspend: false", "suspend: maybe", "suspend is not true or false"),
    "a misspelt field": ("ttlSecondsAfterFinished", "ttlSeconds", "RayJob: there is no field ttlSeconds"),
    "a misspelt version": ("rayVersion", "version", "rayClusterSpec has no field version"),
    "a misspelt group": ("minReplicas", "min", "workerGroupSpecs has no field min"),
    "a head's misspelt field": ("rayStartParams: {num-cpus", "startParams: {num-cpus", "headGroupSpec has no field"),
    "no such option": ("fsu run --max 20", "fsu run --most 20", "entrypoint fsu run: No such option"),
    "no such command": ("fsu run --max 20", "fsu walk --max 20", "entrypoint fsu walk"),
    "no program of ours": ("fsu run --max 20", "python run --max 20", "python is no command of the image"),
    "for ever": ("      activeDeadlineSeconds: 14400\n", "", "costs money for ever"),
    "no token": ("{mode: token}", "{mode: disabled}", "authOptions: the cluster has no token"),
    "two images": ("fsu-ray:2.60.0\n                  env", "fsu-ray:1\n                  env", "are to be of Ray"),
    "another Ray": ('rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', "all are to be of Ray 2.60.0"),
    "nobody": ("serviceAccountName: fsu\n                tol", "hostname: fsu\n                tol", "serviceAccount"),
    "no bucket": ("s3://BUCKET/fsu}", "/mnt}", "FSU_ARTIFACTS: no bucket"),
    "an open ledger": ("valueFrom: {secretKeyRef: {name: fsu-ledger, key: url}}", "value: postgresql://db/fsu",
                       "FSU_LEDGER: not from a Secret"),
    "a ledger on workers": ("- name: ray-worker", "- name: ray-worker\n" + 20 * " " + "env: [{name: FSU_LEDGER}]",
                            "workers never open the ledger"),
    "no GPU": (", nvidia.com/gpu: 1}", "}", "a worker without a GPU"),
    "no end": ("            maxReplicas: 1\n", "", "replicas: 1 to maxReplicas"),
    "a password": ("value: s3://BUCKET/fsu", "value: s3://me:hunter2@BUCKET/fsu", "looks like a URL with a password"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_fault_is_reported(name: str, file: str) -> None:
    """The file changed in one place."""
    old, new, fault = BROKEN[name]
    assert old in file, "the text to change is not in the file"
    reported = faults(file.replace(old, new))
    assert [line for line in reported if fault in line], reported
