"""`cluster.yaml` passes Ray's validator and our checks, and each check reports the fault that it is for.

Ray's own code makes its nodes on moto's EC2; its commands run in a real shell.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from fsu_ray.cluster import template
from fsu_ray.errors import InvalidConfig

ROOT = Path(__file__).parent.parent
FILE = (ROOT / "cluster.yaml").read_text().replace("EDIT-BUCKET", "bucket")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(r) for r in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["postgres"])]
DASHBOARD = "--dashboard-host=127.0.0.1"
FETCH = '"$(aws secretsmanager get-secret-value --secret-id fsu-ray/ledger --query SecretString --output text)"'

# The text that is replaced, its replacement, and the finding that is expected.
BROKEN = {
    "a key too many": ("idle_timeout_minutes:", "idle_minutes:", "Ray refuses the file: ValidationError"),
    "half a GPU": ("GPU: 1}", "GPU: 0.5}", "Ray refuses the file"),
    "no such head": ("head_node_type: head", "head_node_type: boss", "Ray refuses the file: ValueError"),
    "more at least than at most": ("min_workers: 0", "min_workers: 9", "Ray refuses the file: ValueError"),
    "no provider": ("provider:\n  type: aws", "metadata:\n  type: aws", "Ray refuses the file: KeyError"),
    "no name": ("cluster_name: fsu", "#", "cluster_name is missing"),
    "another cloud": ("type: aws", "type: gcp", "provider.type is gcp"),
    "no region": ("  region: us-west-2", "  #", "provider.region is missing"),
    "another region": ("  region: us-west-2", "  region: eu-west-1", "AWS_DEFAULT_REGION=us-west-2 on a head"),
    "nobody logs in": ("auth:\n  ssh_user: ubuntu", "#", "auth.ssh_user is missing"),
    "keys": ("type: aws", "type: aws\n  aws_credentials: {}", "provider.aws_credentials: no keys here"),
    "no end": ("max_workers: 4  # over all", "# over all", "max_workers is None"),
    "no end in sight": ("max_workers: 4  # over all", "max_workers: 100000  #", "max_workers is 100000"),
    "idle by default": ("idle_timeout_minutes: 10", "#", "idle_timeout_minutes is None"),
    "idle for ever": ("idle_timeout_minutes: 10", "idle_timeout_minutes: 600", "idle_timeout_minutes is 600"),
    "no machine": ("InstanceType: g5.xlarge", "KeyName: k", "gpu: node_config has no InstanceType"),
    "any image": ("&ami resolve:ssm:/fsu-ray/ami:1", "&ami latest_dlami", "gpu: ImageId must be"),
    "today's image": ("/fsu-ray/ami:1", "/aws/service/deeplearning/ami/latest/ami-id", "head: ImageId must be"),
    "no image": ("      ImageId: *ami\n", "", "gpu: ImageId must be"),
    "no profile": ("IamInstanceProfile: {Name: fsu-ray-worker}", "#", "gpu: node_config has no IamInstanceProfile"),
    "no profile's name": ("{Name: fsu-ray-head}", "{}", "head: node_config has no IamInstanceProfile"),
    "a GPU on demand": ("InstanceMarketOptions: {MarketType: spot}", "#", "gpu: a GPU that is not on spot"),
    "a hidden GPU": ("{CPU: 4, GPU: 1}\n    node_config:\n      InstanceType: g5.xlarge\n      ImageId: *ami\n"
                     "      IamInstanceProfile: {Name: fsu-ray-worker}  # the bucket, nothing else\n"
                     "      InstanceMarketOptions: {MarketType: spot}",
                     "{}\n    node_config:\n      InstanceType: g5.xlarge\n      ImageId: *ami\n"
                     "      IamInstanceProfile: {Name: fsu-ray-worker}", "gpu: a GPU that is not on spot"),
    "a head with a GPU": ("InstanceType: m7i.xlarge", "InstanceType: g5.xlarge", "head: the head must be"),
    "a head on spot": ("InstanceType: m7i.xlarge", "InstanceType: m7i.xlarge\n"
                       "      InstanceMarketOptions: {MarketType: spot}", "head: the head must be"),
    "no GPU": ("{CPU: 4, GPU: 1}\n    node_config:\n      InstanceType: g5.xlarge",
               "{CPU: 4}\n    node_config:\n      InstanceType: m5.xlarge", "no worker with a GPU"),
    "an open dashboard": (DASHBOARD, "--dashboard-host=0.0.0.0", "--dashboard-host=0.0.0.0 opens the Jobs API"),
    "an open dashboard, apart": (DASHBOARD, "--dashboard-host 0.0.0.0", "--dashboard-host=0.0.0.0 opens the Jobs API"),
    "Ray's own start": ("head_start_ray_commands:", "rsync_exclude:", "--dashboard-host=0.0.0.0 opens the Jobs API"),
    "an open port": ("type: aws", "type: aws\n  security_group: {IpPermissions: [{FromPort: 8265, ToPort: 8265, "
                     "IpProtocol: tcp, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}", "port 8265 is open to the world"),
    "no token": ("RAY_AUTH_MODE=token", "", "RAY_AUTH_MODE=token is not set on a worker"),
    "no authentication": ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token is not set on a head"),
    "a token that stays here": ("  ~/.ray/auth_token: ~/.ray/auth_token", "  {}", "file_mounts has no ~/.ray/"),
    "Ray's own setup": ("setup_commands:\n  - chmod", "rsync_filter:\n  - chmod", "changes every night"),
    "the wheel of the night": ("'ray[default,train,tune]==2.60.0'", "https://ray-wheels/latest/ray-3.0.0.dev0.whl",
                               "a worker does not install ray[default,train,tune]"),
    "any Ray": ("ray[default,train,tune]==2.60.0", "ray[default,train,tune]>=2.60,<2.61", "pin one version of ray"),
    "another Ray": ("tune]==2.60.0", "tune]==2.59.1", "pin one version of ray[default,train,tune]<2.61,>=2.60"),
    "half of Ray": ("ray[default,train,tune]", "ray[default,train]", "a head does not install ray[default,train,tune]"),
    "no library": ("'kneed>=0.8.5'", "", "a head does not install kneed>=0.8.5"),
    "another library": ("torch>=2.14,<2.15", "torch>=2.9", "torch>=2.9, pyproject.toml says torch<2.15,>=2.14"),
    "no driver": ("'psycopg[binary]>=3.2'", "", "a head does not install psycopg[binary]>=3.2"),
    "no hands": ("'boto3>=1.34'", "'click>=8'", "a head does not install boto3"),
    "no bucket": ("FSU_ARTIFACTS=s3://bucket/fsu", "FSU_ARTIFACTS=/mnt/fsu", "FSU_ARTIFACTS is not set to s3://"),
    "no bucket yet": ("s3://bucket/fsu", "s3://EDIT-BUCKET/fsu", "put the name of your bucket there"),
    "an open ledger": (f"FSU_LEDGER={FETCH}", "FSU_LEDGER=postgresql://host/fsu", "FSU_LEDGER must come from a secret"),
    "a ledger on workers": ("/fsu\n    >", f"/fsu FSU_LEDGER={FETCH}\n    >", "FSU_LEDGER is set on a worker"),
    "no patience": ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=1200", "", "START_TIMEOUT_S=60: a spot node takes minutes"),
    "one thread": ("unset OMP_NUM_THREADS; ulimit -n 65536;\n    ray start", "ray start",
                   "worker_start_ray_commands: `ray up` sets OMP_NUM_THREADS=1"),
    "a key of AWS": ("# The token of", f"# {'AKIA' + 'IOSFODNN7EXAMPLE'}\n# The", "looks like an access key"),
    "its other half": ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token K=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY1",
                       "this looks like a long random word"),
    "a password": ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token PGPASSWORD=hunter2", "looks like a password or token"),
    "a URL with one": (f"FSU_LEDGER={FETCH}", "FSU_LEDGER=postgresql://fsu:hunter2@db/fsu", "a URL with a password"),
    "a token": ("RAY_AUTH_MODE=token", f"RAY_AUTH_MODE=token X={'0123456789abcdef' * 4}", "a long random word"),
    "a private key": ("# The token of", "# -----BEGIN RSA PRIVATE KEY-----\n# The", "looks like a private key"),
}  # fmt: skip


def test_the_file_lacks_only_the_name_of_the_bucket() -> None:
    """Ray's validator, and every check of ours."""
    assert template.findings(FILE, NEEDED) == []
    (left,) = template.findings((ROOT / "cluster.yaml").read_text(), NEEDED)
    assert left == "FSU_ARTIFACTS=s3://EDIT-BUCKET/fsu: put the name of your bucket there"


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_reports_its_fault(name: str) -> None:
    """The file changed in one place: the finding is reported, and no secret is repeated."""
    old, new, finding = BROKEN[name]
    assert FILE.count(old) >= 1, "the text to change is not in the file"
    findings = template.findings(FILE.replace(old, new), NEEDED)
    assert [line for line in findings if finding in line], findings
    assert not [line for line in findings if "hunter2" in line or "IOSFODNN7" in line]


def test_a_file_that_is_no_cluster_file() -> None:
    """One line for text that is not YAML, and for YAML that is not a mapping."""
    with pytest.raises(InvalidConfig, match="not YAML") as error:
        template.findings("a: [", NEEDED)
    assert "\n" not in str(error.value)
    with pytest.raises(InvalidConfig, match="not a cluster file"):
        template.findings("[1]", NEEDED)


def test_the_command_line(tmp_path: Path) -> None:
    """Exit code 2 with the findings, or with one line if there is no file; Ray prints nothing."""

    def look(file: Path) -> tuple[int, str]:
        command = [sys.executable, "-m", "fsu_ray.cluster.template", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        return done.returncode, done.stdout + done.stderr

    needs = [f"{r.name}{r.specifier}" for r in template.needed()]
    assert len(needs) > 10
    assert [r for r in needs if r.startswith("psycopg")]
    assert not [r for r in needs if r.startswith(("pytest", "optuna"))]
    code, printed = look(tmp_path / "none.yaml")
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith(f"error: {tmp_path}/none.yaml cannot be read: ")
    (tmp_path / "open.yaml").write_text(FILE.replace(DASHBOARD, "--dashboard-host=0.0.0.0"))
    code, printed = look(tmp_path / "open.yaml")
    assert (code, "--dashboard-host=0.0.0.0 opens" in printed, "INFO" in printed) == (2, True, False)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's AWS with the two profiles and the AMI's parameter, and a home folder for Ray's key pair."""
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("HOME", str(tmp_path))
    with mock_aws():
        for name in ("fsu-ray-head", "fsu-ray-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore", "ignore::DeprecationWarning:moto")
def test_what_ray_makes_of_it_on_aws(aws: Any) -> None:
    """Ray's own bootstrap and node provider: ssh alone is open, the worker is on spot with its profile and IMDSv2, and
    what the file states of the type is what EC2 says of it."""
    import yaml
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    config = bootstrap_aws(prepare_config(yaml.safe_load(FILE)))
    (group,) = [g for g in aws.describe_security_groups()["SecurityGroups"] if g["GroupName"] == "ray-autoscaler-fsu"]
    opened = [(r.get("FromPort"), [i["CidrIp"] for i in r["IpRanges"]]) for r in group["IpPermissions"]]
    assert opened == [(None, []), (22, ["0.0.0.0/0"])]
    assert [pair["GroupId"] for pair in group["IpPermissions"][0]["UserIdGroupPairs"]] == [group["GroupId"]]

    stated = config["available_node_types"]
    (known,) = aws.describe_instance_types(InstanceTypes=["g5.xlarge"])["InstanceTypes"]
    known = {"CPU": known["VCpuInfo"]["DefaultVCpus"], "GPU": known["GpuInfo"]["Gpus"][0]["Count"]}
    assert stated["gpu"]["resources"] == known

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in ("head", "gpu"):
        provider.create_node(stated[kind]["node_config"], {"ray-node-type": kind, "ray-launch-config": "x"}, 1)
    nodes = [node for group in aws.describe_instances()["Reservations"] for node in group["Instances"]]
    head, gpu = sorted(nodes, key=lambda node: node["InstanceType"], reverse=True)
    assert (head["InstanceType"], gpu["InstanceType"]) == ("m7i.xlarge", "g5.xlarge")
    assert (head.get("InstanceLifecycle"), gpu["InstanceLifecycle"]) == (None, "spot")
    assert head["IamInstanceProfile"]["Arn"].endswith("/fsu-ray-head")
    assert gpu["IamInstanceProfile"]["Arn"].endswith("/fsu-ray-worker")
    assert {node["MetadataOptions"]["HttpTokens"] for node in nodes} == {"required"}
    assert {node["ImageId"] for node in nodes} == {"resolve:ssm:/fsu-ray/ami:1"}


def carry_out(home: Path, node: str) -> subprocess.CompletedProcess[str]:
    """The commands of a node as `ray up` runs them, but for what installs something: a shell each, in `home`."""
    import yaml
    from ray.autoscaler._private.command_runner import _with_interactive

    file = yaml.safe_load(FILE)
    commands = [c for c in file["setup_commands"] if "pip install" not in c and "venv" not in c]
    for command in (*commands, *file[f"{node}_start_ray_commands"]):
        words = _with_interactive(f"export RAY_HEAD_IP=10.0.0.1; {command}")
        done = subprocess.run(" ".join(words), shell=True, capture_output=True, text=True, timeout=30,
                              env={"HOME": str(home), "PATH": "/usr/bin:/bin"})  # fmt: skip
        if done.returncode:
            break
    return done


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node's home: the token, a `ray` that notes its arguments and environment, an `aws` that knows the secret."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    (tmp_path / "fsu" / "bin").mkdir(parents=True)
    (tmp_path / "fsu" / "bin" / "ray").write_text('#!/bin/sh\necho "$@" >> ~/arguments\nenv > ~/environment\n')
    (tmp_path / "fsu" / "bin" / "aws").write_text("#!/bin/sh\necho postgresql://fsu:hunter2@db/fsu\n")
    for file in (tmp_path / "fsu" / "bin" / "ray", tmp_path / "fsu" / "bin" / "aws"):
        file.chmod(0o755)
    return tmp_path


def test_what_the_head_s_processes_find(node: Path) -> None:
    """The ledger's URL in the environment and in no argument; token, bucket and region; threads as Ray wants them."""
    done = carry_out(node, "head")
    assert done.returncode == 0, done.stderr
    environment = dict(line.split("=", 1) for line in (node / "environment").read_text().splitlines() if "=" in line)
    assert environment["FSU_LEDGER"] == "postgresql://fsu:hunter2@db/fsu"
    assert (environment["RAY_AUTH_MODE"], environment["FSU_ARTIFACTS"]) == ("token", "s3://bucket/fsu")
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert (environment["AWS_DEFAULT_REGION"], environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) == (
        "us-west-2",
        "1200",
    )
    assert environment["PATH"].startswith(f"{node}/fsu/bin:")
    assert "OMP_NUM_THREADS" not in environment
    arguments = (node / "arguments").read_text()
    assert arguments.startswith("stop\nstart --head --port=6379")
    assert DASHBOARD in arguments
    assert "hunter2" not in arguments + done.stdout + done.stderr
    files = [file for file in node.rglob("*") if file.is_file() and file.name not in ("environment", "aws")]
    assert not [file for file in files if "hunter2" in file.read_text()]
    assert (node / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert carry_out(node, "head").returncode == 0
    assert (node / ".bashrc").read_text().count("fsu-env") == 1  # a second `ray up` adds nothing


def test_what_a_worker_s_processes_find(node: Path) -> None:
    """The token and the threads, and not the ledger."""
    done = carry_out(node, "worker")
    assert done.returncode == 0, done.stderr
    environment = dict(line.split("=", 1) for line in (node / "environment").read_text().splitlines() if "=" in line)
    assert (environment["RAY_AUTH_MODE"], environment.get("FSU_LEDGER"), environment.get("OMP_NUM_THREADS")) == (
        "token",
        None,
        None,
    )
    assert "start --address=10.0.0.1:6379" in (node / "arguments").read_text()


def test_a_head_that_may_not_read_the_secret_does_not_start(node: Path) -> None:
    """`ray up` fails there instead of making a cluster whose jobs fail."""
    (node / "fsu" / "bin" / "aws").write_text("#!/bin/sh\necho AccessDenied >&2\nexit 254\n")
    done = carry_out(node, "head")
    assert done.returncode == 254
    assert "AccessDenied" in done.stdout + done.stderr
    assert (node / "arguments").read_text() == "stop\n"
    assert os.path.exists(node / ".fsu-env")
