"""`python -m fsu_ray.cluster.template cluster.yaml`: what is wrong with a cluster file for `ray up`, a line each.

Ray's own validator looks at the schema. It lets through what opens the cluster to the world, costs money without
end, or breaks a run an hour later: defaults that it fills in (a nightly wheel, a dashboard on 0.0.0.0, the name
"default"), nodes without an instance type, a profile or a pinned image, GPUs that are not on spot, a library in
another version than pyproject.toml has, a secret. The commands are looked at with Ray's defaults filled in, as they
would be carried out. Nothing is started and nothing is asked of AWS.
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from fsu_ray.errors import FsuError, InvalidConfig

MOST_WORKERS = 64
"""A max_workers above this is taken for a slip: nobody means to pay for it."""

LONGEST_IDLE = 60
"""Minutes that an idle GPU may be kept."""

SHORTEST_START = 600
"""Seconds that a worker group must be allowed to wait for a node: a spot node is there after minutes."""

SECRETS = {
    "an access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a URL with a password": r"://[^\s/:@$]+:[^\s/@$]+@",
    "a password or token": r"(?i)(?:password|passwd|secret_access_key|session_token|auth_token|api_key)\s*[=:]\s*"
    r"[\"']?(?!~)[^\s\"'$]{4,}",
    "a long random word": r"(?<![\w/+.-])(?:(?=\w*\d)[0-9a-f]{32,}|"
    r"(?=[\w/+]*\d)(?=[\w/+]*[a-z])(?=[\w/+]*[A-Z])[\w/+]{40,})(?![\w/+.-])",
}


@dataclass(frozen=True)
class Template:
    """A cluster file: as it is written, with Ray's defaults filled in, and the libraries that its nodes need."""

    written: Mapping[str, Any]
    filled: Mapping[str, Any]
    needed: tuple[Requirement, ...]

    @property
    def types(self) -> Mapping[str, Any]:
        """The node types by name."""
        found: Mapping[str, Any] = self.filled["available_node_types"]
        return found

    @property
    def head(self) -> str:
        """The name of the head's type."""
        return str(self.filled["head_node_type"])

    def commands(self, node: str) -> list[str]:
        """Everything that is carried out on a `head` or on a `worker`, in that order."""
        parts = ("initialization_commands", f"{node}_setup_commands", f"{node}_start_ray_commands")
        return [command for part in parts for command in self.filled[part]]

    def environment(self, node: str) -> dict[str, str]:
        """What the commands of a `head` or a `worker` set: NAME=VALUE anywhere in them."""
        pairs = (re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", word, re.S) for word in self.words(node))
        return {pair[1]: pair[2] for pair in pairs if pair}

    def words(self, node: str) -> list[str]:
        """The commands of a `head` or a `worker` as words, without quotes."""
        return [word for command in self.commands(node) for word in _split(command)]


def findings(text: str, needed: Iterable[Requirement]) -> list[str]:
    """What is wrong with the cluster file `text`, a line each; nodes must install what is `needed`.

    Raises InvalidConfig where it is not YAML. Where Ray refuses the file, that and secrets are all that is found.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        written = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"this is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(written, dict):
        raise InvalidConfig("this is not a cluster file: it must be a mapping with a provider")
    found = list(secrets(text))
    try:
        filled = prepare_config(written)
        validate_config(filled)
    except Exception as error:  # Ray raises what it likes: ValidationError, KeyError, RuntimeError, click's ...
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        return [*found, f"Ray refuses the file: {type(error).__name__}: {reason}"]
    template = Template(written, filled, tuple(needed))
    return found + [finding for check in CHECKS for finding in check(template)]


def needed() -> list[Requirement]:
    """What a node must have installed: the requirements of this package, and the driver of PostgreSQL."""
    try:
        stated = [Requirement(text) for text in metadata.requires("fsu_ray") or ()]
    except metadata.PackageNotFoundError:
        raise InvalidConfig("fsu_ray is not installed, so what it requires is not known: pip install .") from None
    return [each for each in stated if each.marker is None or each.marker.evaluate({"extra": "postgres"})]


def secrets(text: str) -> Iterator[str]:
    """Lines, comments too, that hold what looks like a secret; the finding does not repeat it."""
    for number, line in enumerate(text.splitlines(), 1):
        for name, pattern in SECRETS.items():
            if re.search(pattern, line):
                yield f"line {number}: this looks like {name}; leave it in a secret, which the instance profile reads"
                break


def _names(template: Template) -> Iterator[str]:
    """The cluster, its place and who logs in."""
    if not template.written.get("cluster_name"):
        yield "cluster_name is missing: Ray would take 'default', as would the next cluster, and share its nodes"
    provider = template.written["provider"]
    if provider["type"] != "aws":
        yield f"provider.type is {provider['type']}: these checks, and the file that they come with, are for aws"
    if not provider.get("region"):
        yield "provider.region is missing"
    if not (template.written.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user is missing: ubuntu on Ubuntu's images"
    if "aws_credentials" in provider:
        yield "provider.aws_credentials: no keys here; nodes have an instance profile, you have `aws configure`"


def _bounds(template: Template) -> Iterator[str]:
    """What it may cost."""
    most = template.written.get("max_workers")
    if most is None or not 1 <= most <= MOST_WORKERS:
        yield f"max_workers is {most}: state how many nodes may run at most, 1 to {MOST_WORKERS}"
    idle = template.written.get("idle_timeout_minutes")
    if idle is None or not 0 < idle <= LONGEST_IDLE:
        yield f"idle_timeout_minutes is {idle}: state after how long an idle node goes, up to {LONGEST_IDLE}"


def _nodes(template: Template) -> Iterator[str]:
    """Each node type: what it is, what it boots, who it is, and what it is paid as."""
    for name, kind in template.types.items():
        node = kind["node_config"]
        if not node.get("InstanceType"):
            yield f"{name}: node_config has no InstanceType"
        if not re.fullmatch(r"ami-[0-9a-f]{8,17}|resolve:ssm:[\w./-]+:\d+", str(node.get("ImageId", ""))):
            yield f"{name}: ImageId must be an AMI's id or resolve:ssm:NAME:VERSION, so that all nodes are the same"
        if not (node.get("IamInstanceProfile") or {}).keys() & {"Name", "Arn"}:
            yield f"{name}: node_config has no IamInstanceProfile, without which it has no access to the bucket"
        spot = (node.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
        if name == template.head and (spot or _gpus(kind)):
            yield f"{name}: the head must be a node on demand without a GPU: it stays, and runs the drivers"
        if name != template.head and _gpus(kind) and not spot:
            yield f"{name}: a GPU that is not on spot: InstanceMarketOptions: {{MarketType: spot}}"
    if not [name for name, kind in template.types.items() if name != template.head and _gpus(kind)]:
        yield "available_node_types has no worker with a GPU"


def _doors(template: Template) -> Iterator[str]:
    """Who gets in: the dashboard, the security group, the token."""
    words = template.words("head")
    hosts = [word.partition("=")[2] for word in words if word.startswith("--dashboard-host=")]
    hosts += [after for word, after in pairwise(words) if word == "--dashboard-host"]
    for host in hosts:
        if host not in ("127.0.0.1", "localhost"):
            yield f"head_start_ray_commands: --dashboard-host={host} opens the Jobs API; take 127.0.0.1"
    for rule in (template.filled["provider"].get("security_group") or {}).get("IpPermissions") or ():
        places = [
            r.get("CidrIp") or r.get("CidrIpv6") for r in (*rule.get("IpRanges", ()), *rule.get("Ipv6Ranges", ()))
        ]
        if {"0.0.0.0/0", "::/0"} & set(places) and (rule.get("FromPort"), rule.get("ToPort")) != (22, 22):
            yield f"provider.security_group: port {rule.get('FromPort')} is open to the world; ssh forwards ports"
    for node in ("head", "worker"):
        if template.environment(node).get("RAY_AUTH_MODE") != "token":
            yield f"RAY_AUTH_MODE=token is not set on a {node}: whoever reaches its ports may run anything"
    if not [place for place in template.filled["file_mounts"] if place.endswith("/.ray/auth_token")]:
        yield "file_mounts has no ~/.ray/auth_token: nodes that have no token do not start"


def _libraries(template: Template) -> Iterator[str]:
    """What nodes install: the requirements of pyproject.toml, Ray pinned, and nothing of the night before."""
    for node in ("head", "worker"):
        for command in template.commands(node):
            if re.search(r"nightly|ray-wheels|\.whl\b|\.dev\d", command):
                yield f"a {node} installs a wheel that changes every night (Ray's default): state setup_commands"
        installed = {canonicalize_name(each.name): each for each in map(_requirement, template.words(node)) if each}
        for need in template.needed:
            have = installed.get(canonicalize_name(need.name))
            if have is None or not need.extras <= have.extras:
                yield f"a {node} does not install {_text(need)}"
            elif need.name == "ray":
                pins = [clause.version for clause in have.specifier if clause.operator == "=="]
                if len(pins) != 1 or not need.specifier.contains(pins[0]):
                    yield f"a {node} installs {_text(have)}: pin one version of {_text(need)} with =="
            elif have.specifier != need.specifier:
                yield f"a {node} installs {_text(have)}, pyproject.toml says {_text(need)}"
    if "boto3" not in {each.name for each in map(_requirement, template.words("head")) if each}:
        yield "a head does not install boto3, with which Ray starts and ends workers"


def _environment(template: Template) -> Iterator[str]:
    """What processes find: where things lie, from where the ledger's URL comes, threads, patience."""
    head, worker = template.environment("head"), template.environment("worker")
    artifacts = head.get("FSU_ARTIFACTS", "")
    if not re.match(r"(s3|gs)://", artifacts):
        yield "FSU_ARTIFACTS is not set to s3://BUCKET/PREFIX on a head"
    elif "EDIT" in artifacts:
        yield f"FSU_ARTIFACTS={artifacts}: put the name of your bucket there"
    if not head.get("FSU_LEDGER", "").startswith("$("):
        yield 'FSU_LEDGER must come from a secret on the head: FSU_LEDGER="$(aws secretsmanager ...)" first'
    if "FSU_LEDGER" in worker:
        yield "FSU_LEDGER is set on a worker: those never open the ledger"
    region = template.written["provider"].get("region")
    if head.get("AWS_DEFAULT_REGION") != region:
        yield f"AWS_DEFAULT_REGION={head.get('AWS_DEFAULT_REGION')} on a head, provider.region is {region}"
    patience = head.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    if not patience.isdigit() or int(patience) < SHORTEST_START:
        yield f"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S={patience}: a spot node takes minutes; {SHORTEST_START} or more"
    for node in ("head", "worker"):
        starts = [command for command in template.commands(node) if "ray start" in command]
        if not all("unset OMP_NUM_THREADS" in command for command in starts):
            yield f"{node}_start_ray_commands: `ray up` sets OMP_NUM_THREADS=1; unset it, or workers have one thread"


CHECKS: tuple[Callable[[Template], Iterator[str]], ...] = (
    _names,
    _bounds,
    _nodes,
    _doors,
    _libraries,
    _environment,
)


def _gpus(kind: Mapping[str, Any]) -> bool:
    """Whether a node type has a GPU: by what it states, else by AWS's names (g5.xlarge, p4d.24xlarge)."""
    stated = kind["resources"].get("GPU", 0) > 0
    return stated or re.match(r"[gp]\d", str(kind["node_config"].get("InstanceType", ""))) is not None


def _split(command: str) -> list[str]:
    """The words of a shell command; where its quotes do not close, what stands between spaces."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _requirement(word: str) -> Requirement | None:
    """`word` as a requirement, if it is one that names a version."""
    if not re.match(r"[A-Za-z][\w.-]*(\[[\w,-]+\])?\s*(==|>=|<=|~=|!=|<|>|@)", word):
        return None
    try:
        return Requirement(word)
    except InvalidRequirement:
        return None


def _text(requirement: Requirement) -> str:
    """Name, extras and versions, without a marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def main() -> int:
    """Look at a file and print what is wrong with it; 0 nothing, 2 something, or a file that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("cluster.yaml"))
    file: Path = parser.parse_args().file
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)  # it tells of the values that it fills in
    try:
        found = findings(file.read_text(), needed())
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {file} cannot be read: {error}", file=sys.stderr)
        return 2
    except FsuError as error:
        print(f"error: {file}: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(found) or f"{file}: nothing is wrong")
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
