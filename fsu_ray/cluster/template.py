"""`python -m fsu_ray.cluster.template cluster.yaml`: what is wrong with a cluster file for `ray up`, one line each.

Ray's own validator checks the schema only. It accepts files that open the cluster to the world, cost money without
limit, or break a run an hour later: defaults that Ray fills in (a nightly wheel, a dashboard on 0.0.0.0, the name
"default"), nodes without an instance type, a profile or a pinned image, GPUs that are not on spot, a library in
another version than pyproject.toml requires, a secret. The commands are checked with Ray's defaults filled in, as they
would run. Nothing is started and AWS is not asked.
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

from fsu_ray.cluster import internals
from fsu_ray.errors import FsuError, InvalidConfig

MOST_WORKERS = 64
"""A max_workers above this is taken for a typing error."""

LONGEST_IDLE = 60
"""The highest idle_timeout_minutes that is accepted."""

SHORTEST_START = 600
"""The fewest seconds a worker group may wait for its nodes: a spot node takes minutes to start."""

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
    """A cluster file as written, the same with Ray's defaults filled in, and the libraries that its nodes need."""

    written: Mapping[str, Any]
    filled: Mapping[str, Any]
    needed: tuple[Requirement, ...]

    @property
    def types(self) -> Mapping[str, Any]:
        """The node types by name."""
        types: Mapping[str, Any] = self.filled["available_node_types"]
        return types

    @property
    def head(self) -> str:
        """The name of the head's type."""
        return str(self.filled["head_node_type"])

    def commands(self, node: str) -> list[str]:
        """The commands that Ray runs on a `head` or on a `worker`, in that order."""
        parts = ("initialization_commands", f"{node}_setup_commands", f"{node}_start_ray_commands")
        return [command for part in parts for command in self.filled[part]]

    def environment(self, node: str) -> dict[str, str]:
        """The variables that the commands of a `head` or a `worker` set: NAME=VALUE anywhere in them."""
        pairs = (re.fullmatch(r"([A-Z][A-Z0-9_]*)=(.*)", word, re.S) for word in self.words(node))
        return {pair[1]: pair[2] for pair in pairs if pair}

    def words(self, node: str) -> list[str]:
        """The commands of a `head` or a `worker` as words, without quotes."""
        return [word for command in self.commands(node) for word in _split(command)]


def findings(text: str, needed: Iterable[Requirement]) -> list[str]:
    """What is wrong with the cluster file `text`, one line each; nodes must install what is `needed`.

    Raises InvalidConfig if `text` is not YAML, UserError for a Ray of another version. If Ray refuses the file, only
    that and secrets are reported.
    """
    internals.check_version()
    try:
        written = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfig(f"this is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(written, dict):
        raise InvalidConfig("this is not a cluster file: it must be a mapping with a provider")
    in_secrets = list(secrets(text))
    try:
        filled = internals.fill_cluster_file(written)
    except Exception as error:  # of many types: ValidationError, KeyError, RuntimeError, click's ...
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        return [*in_secrets, f"Ray refuses the file: {type(error).__name__}: {reason}"]
    template = Template(written, filled, tuple(needed))
    return in_secrets + [finding for check in CHECKS for finding in check(template)]


def needed() -> list[Requirement]:
    """What a node must have installed: the requirements of this package and the driver of PostgreSQL."""
    try:
        stated = [Requirement(text) for text in metadata.requires("fsu_ray") or ()]
    except metadata.PackageNotFoundError:
        raise InvalidConfig("fsu_ray is not installed, so its requirements are not known: pip install .") from None
    return [each for each in stated if each.marker is None or each.marker.evaluate({"extra": "postgres"})]


def secrets(text: str) -> Iterator[str]:
    """Lines, comments included, with something like a secret; the finding does not repeat the secret."""
    for number, line in enumerate(text.splitlines(), 1):
        for name, pattern in SECRETS.items():
            if re.search(pattern, line):
                yield f"line {number}: this looks like {name}; leave it in a secret, which the instance profile reads"
                break


def _names(template: Template) -> Iterator[str]:
    """The name of the cluster, its cloud and region, its user."""
    if not template.written.get("cluster_name"):
        yield "cluster_name is missing: Ray would take 'default', as would the next cluster, and share its nodes"
    provider = template.written["provider"]
    if provider["type"] != "aws":
        yield f"provider.type is {provider['type']}: cluster.yaml and these checks are for aws"
    if not provider.get("region"):
        yield "provider.region is missing"
    if not (template.written.get("auth") or {}).get("ssh_user"):
        yield "auth.ssh_user is missing: ubuntu on Ubuntu's images"
    if "aws_credentials" in provider:
        yield "provider.aws_credentials: no keys here; nodes have an instance profile, you have `aws configure`"


def _bounds(template: Template) -> Iterator[str]:
    """What the cluster may cost at most."""
    limit = template.written.get("max_workers")
    if limit is None or not 1 <= limit <= MOST_WORKERS:
        yield f"max_workers is {limit}: set the highest number of nodes, 1 to {MOST_WORKERS}"
    idle = template.written.get("idle_timeout_minutes")
    if idle is None or not 0 < idle <= LONGEST_IDLE:
        yield f"idle_timeout_minutes is {idle}: set the minutes after which an idle node is ended, up to {LONGEST_IDLE}"


def _nodes(template: Template) -> Iterator[str]:
    """Each node type: instance type, image, instance profile, on demand or on spot."""
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
            yield f"{name}: the head must be on demand and without a GPU: it stays up and runs the drivers"
        if name != template.head and _gpus(kind) and not spot:
            yield f"{name}: a GPU that is not on spot: InstanceMarketOptions: {{MarketType: spot}}"
    if not [name for name, kind in template.types.items() if name != template.head and _gpus(kind)]:
        yield "available_node_types has no worker with a GPU"


def _doors(template: Template) -> Iterator[str]:
    """Access from outside: the dashboard, the security group, the token."""
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
        yield "file_mounts has no ~/.ray/auth_token: nodes without the token do not start"


def _libraries(template: Template) -> Iterator[str]:
    """What nodes install: the requirements of pyproject.toml, Ray pinned, no nightly wheel."""
    for node in ("head", "worker"):
        for command in template.commands(node):
            if re.search(r"nightly|ray-wheels|\.whl\b|\.dev\d", command):
                yield f"a {node} installs a wheel that changes every night (Ray's default): set setup_commands"
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
    """The environment of processes: artifacts, the ledger's URL, threads, how long a run waits for nodes."""
    head, worker = template.environment("head"), template.environment("worker")
    artifacts = head.get("FSU_ARTIFACTS", "")
    if not re.match(r"(s3|gs)://", artifacts):
        yield "FSU_ARTIFACTS is not set to s3://BUCKET/PREFIX on a head"
    elif "EDIT" in artifacts:
        yield f"FSU_ARTIFACTS={artifacts}: put the name of your bucket there"
    if not head.get("FSU_LEDGER", "").startswith("$("):
        yield 'FSU_LEDGER must come from a secret on the head: FSU_LEDGER="$(aws secretsmanager ...)" first'
    if "FSU_LEDGER" in worker:
        yield "FSU_LEDGER is set on a worker: workers never open the ledger"
    region = template.written["provider"].get("region")
    if head.get("AWS_DEFAULT_REGION") != region:
        yield f"AWS_DEFAULT_REGION={head.get('AWS_DEFAULT_REGION')} on a head, provider.region is {region}"
    timeout = head.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    if not timeout.isdigit() or int(timeout) < SHORTEST_START:
        yield f"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S={timeout}: a spot node takes minutes; {SHORTEST_START} or more"
    for node in ("head", "worker"):
        starts = [command for command in template.commands(node) if "ray start" in command]
        if not all("unset OMP_NUM_THREADS" in command for command in starts):
            yield f"{node}_start_ray_commands: `ray up` sets OMP_NUM_THREADS=1; unset it, else workers have one thread"


CHECKS: tuple[Callable[[Template], Iterator[str]], ...] = (
    _names,
    _bounds,
    _nodes,
    _doors,
    _libraries,
    _environment,
)


def _gpus(kind: Mapping[str, Any]) -> bool:
    """Whether a node type has a GPU: by its `resources`, or by AWS's type names (g5.xlarge, p4d.24xlarge)."""
    listed = kind["resources"].get("GPU", 0) > 0
    return listed or re.match(r"[gp]\d", str(kind["node_config"].get("InstanceType", ""))) is not None


def _split(command: str) -> list[str]:
    """The words of a shell command; split at spaces if its quotes do not close."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _requirement(word: str) -> Requirement | None:
    """`word` as a requirement, None unless it is one with a version."""
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
    """Print what is wrong with a file. Exit code 0 for nothing, 2 for findings or a file that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("cluster.yaml"))
    file: Path = parser.parse_args().file
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)  # it reports each default that it fills in
    try:
        problems = findings(file.read_text(), needed())
    except (OSError, UnicodeDecodeError) as error:
        print(f"error: {file} cannot be read: {error}", file=sys.stderr)
        return 2
    except FsuError as error:
        print(f"error: {file}: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(problems) or f"{file}: nothing is wrong")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
