"""Buckets behind a faulty network: retries, interrupted uploads, and error messages.

The server is a real one (moto's); faults are those of the protocol, made by a proxy in front of it.
"""

from __future__ import annotations

import gc
import hashlib
import http.client
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from fsu_ray.errors import StorageError
from fsu_ray.storage import artifacts
from fsu_ray.storage.artifacts import Artifacts, Retries, locate

IN_PARTS = bytes(range(256)) * 48_000  # 12 MB: sent in two parts
CODES = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path hold `where`: an HTTP status, "cut" (the
    connection ends in the middle of the body), "silence" (no answer), "hold" (it waits until `go_on` is set)."""

    where: str
    what: int | str
    times: int = 1
    met: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a server, except for faults; `seen` lists the methods and paths of requests."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passer)
        self.server = server
        self.seen: list[str] = []
        self.faults: list[Fault] = []
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """These tests break connections on purpose."""


class _Passer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _pass(self) -> None:
        proxy = self.server
        asked = f"{self.command} {self.path}"
        proxy.seen.append(asked)
        fault = next((fault for fault in proxy.faults if fault.times > 0 and fault.where in asked), None)
        if fault is not None:
            fault.times -= 1
        if fault is not None and fault.what == "cut":
            self.rfile.read(20 if self.command == "PUT" else 0)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._body()
        if fault is not None:
            fault.met.set()
            if isinstance(fault.what, int):
                self._refuse(fault.what)
                return
            if fault.what == "silence":
                proxy.closing.wait(60)
                self.close_connection = True
                return
            fault.go_on.wait(60)
        self._forward(body)

    def _body(self) -> bytes:
        """The body as it came, in chunks if it did."""
        if not self.headers.get("Transfer-Encoding"):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = b""
        while True:
            line = self.rfile.readline()
            chunks += line + self.rfile.read(int(line, 16) + 2)
            if int(line, 16) == 0:
                return chunks

    def _refuse(self, status: int) -> None:
        text = f"<Error><Code>{CODES[status]}</Code><Message>as the test wants it</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _forward(self, body: bytes) -> None:
        upstream = http.client.HTTPConnection(self.server.server)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":
                upstream.putheader(name, value)
        upstream.endheaders()
        upstream.send(body)
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data)
        upstream.close()

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _pass  # noqa: N815 (the names are http.server's)


@pytest.fixture
def proxy(s3_server: str) -> Iterator[Proxy]:
    """A proxy to the S3 server."""
    proxy = Proxy(s3_server)
    threading.Thread(target=proxy.serve_forever, args=[0.02], daemon=True).start()
    yield proxy
    proxy.closing.set()
    for fault in proxy.faults:
        fault.go_on.set()
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def store(proxy: Proxy, s3_bucket: Any) -> Artifacts:
    """A store in an empty bucket behind the proxy."""
    store = Artifacts.open(s3_bucket.uri(address=proxy.address))
    proxy.seen.clear()
    return store


@pytest.fixture
def impatient(proxy: Proxy, s3_bucket: Any) -> Artifacts:
    """`store`, but with two attempts that wait a second, so that tests are short."""
    store = Artifacts.open(s3_bucket.uri(address=proxy.address), Retries(attempts=2, silence=1.0))
    proxy.seen.clear()
    return store


def methods(proxy: Proxy) -> list[str]:
    """The methods of the requests since the last call."""
    methods = [seen.partition(" ")[0] for seen in proxy.seen]
    proxy.seen.clear()
    return methods


def test_few_requests(proxy: Proxy, store: Artifacts) -> None:
    """A round trip to a bucket takes 20 to 50 ms: each call makes one or two requests."""
    digest = store.put(b"weights")
    assert methods(proxy) == ["HEAD", "PUT"]
    store.put(b"weights")
    assert methods(proxy) == ["HEAD"]
    store.get(digest)
    assert methods(proxy) == ["HEAD", "GET"]
    assert store.has(digest)
    assert store.size(digest) == 7
    assert methods(proxy) == ["HEAD", "HEAD"]
    store.digests()
    assert methods(proxy) == ["GET"]
    Artifacts.open(store.location)
    assert methods(proxy) == ["PUT"]
    pickle.loads(pickle.dumps(store)).has(digest)
    assert methods(proxy) == ["HEAD"], "a worker asks for nothing else first"


@pytest.mark.parametrize(
    ("where", "what"),
    [("PUT", 500), ("HEAD", 500), ("GET", 503), ("PUT", "cut"), ("GET", "cut"), ("GET", "silence"),
     pytest.param("PUT", "silence", marks=pytest.mark.slow)],
)  # fmt: skip
def test_faults_of_the_service_are_retried(proxy: Proxy, impatient: Artifacts, where: str, what: int | str) -> None:
    """The caller sees no error."""
    proxy.faults = [Fault(where, what)]

    digest = impatient.put(b"weights" * 100)

    assert impatient.get(digest) == b"weights" * 100
    assert proxy.faults[0].times == 0
    assert sum(seen.startswith(where) for seen in proxy.seen) - (where == "HEAD") == 2


@pytest.mark.parametrize(
    ("data", "where", "what"),
    [
        (b"weights" * 100, "PUT", 500),
        (b"weights" * 100, "PUT", "cut"),
        (IN_PARTS, "?uploads", 500),
        (IN_PARTS, "partNumber=1", 500),
        (IN_PARTS, "partNumber=2", "cut"),
        (IN_PARTS, "?uploadId", 500),
    ],
)
def test_an_upload_that_fails_leaves_nothing(
    proxy: Proxy, impatient: Artifacts, s3_bucket: Any, data: bytes, where: str, what: int | str
) -> None:
    """Wherever it breaks off; the next upload starts anew."""
    digest = hashlib.sha256(data).hexdigest()
    proxy.faults = [Fault(where, what, times=100)]

    with pytest.raises(StorageError, match=r"cannot be written to s3://.*check that bucket or set") as caught:
        impatient.put(data)

    assert "\n" not in str(caught.value)
    del caught  # the last that knows the stream, which ends here at the latest
    gc.collect()
    assert s3_bucket.names() == []
    assert not impatient.has(digest)
    proxy.faults = []
    assert impatient.put(data) == digest
    assert impatient.get(digest) == data


PUT = """
import sys
from fsu_ray.storage.artifacts import Artifacts

Artifacts(sys.argv[1]).put(bytes(range(256)) * int(sys.argv[2]))
"""


@pytest.mark.parametrize(("rows", "where"), [(4_000, "PUT"), (48_000, "partNumber=2"), (48_000, "?uploadId")])
def test_a_killed_writer_leaves_nothing(proxy: Proxy, store: Artifacts, s3_bucket: Any, rows: int, where: str) -> None:
    """SIGKILL when the server has received the whole body but not stored it, or one part of two."""
    hold = Fault(where, "silence")
    proxy.faults = [hold]
    writer = subprocess.Popen([sys.executable, "-c", PUT, store.location, str(rows)])
    assert hold.met.wait(60)

    writer.kill()
    writer.wait()

    assert s3_bucket.names() == []
    assert store.put(bytes(range(256)) * rows) in store.digests()


def test_an_interrupt_at_any_line_leaves_the_whole_or_nothing(
    store: Artifacts, s3_bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt reaches the main thread between two lines; the test tries every line."""
    left, interrupted, whole = 0, 0, 0

    def line(frame: Any, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != artifacts.__file__:
            return None
        left -= event == "line"
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return line

    for lines in range(200):
        data = f"weights {lines}".encode() * 100
        left = lines
        sys.settrace(line)
        try:
            store.put(data)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        digest = hashlib.sha256(data).hexdigest()
        if store.has(digest):
            whole += 1
            assert store.get(digest) == data
    assert interrupted > 10
    assert 0 < whole < interrupted


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_bucket_that_does_not_exist(request: pytest.FixtureRequest, kind: str) -> None:
    """One line, without waiting, for artifacts and for checkpoints."""
    bucket = request.getfixturevalue(f"{kind}_bucket")
    location = bucket.uri().replace(bucket.name, "no-such-bucket")
    begun = time.monotonic()
    for what, setting in ((Artifacts.open, "FSU_ARTIFACTS"), (locate, "FSU_RUNS")):
        with pytest.raises(StorageError, match=f"check the bucket, .* set {setting} to") as caught:
            what(location)
        assert "no-such-bucket/store" in str(caught.value)
        assert "does not exist" in str(caught.value) or "404" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "scheme=" not in str(caught.value)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_nobody_at_the_endpoint(s3_server: str, kind: str) -> None:
    """The client retries, but not for ever."""
    retries = Retries(attempts=2, total=1.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        user = "anonymous@" if kind == "gs" else ""
        with pytest.raises(StorageError, match=r"cannot be written to \(.*onnect to .*\); check the bucket") as caught:
            Artifacts.open(f"{kind}://{user}bucket/p?endpoint_override={address}&scheme=http", retries)
    assert "\n" not in str(caught.value)


def test_an_endpoint_from_the_environment(monkeypatch: pytest.MonkeyPatch, s3_server: str, s3_bucket: Any) -> None:
    """As with Amazon's tools; a worker without the variable uses the same endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_server}")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    store = Artifacts.open(f"s3://{s3_bucket.name}/store")
    digest = store.put(b"weights")
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)

    assert pickle.loads(pickle.dumps(store)).get(digest) == b"weights"
    assert s3_bucket.names() == [f"{digest[:2]}/{digest}"]


@pytest.fixture(scope="module")
def strict_server(s3_server: str, serving: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """A server that checks signatures and policies, a bucket, and a user who may only read there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "4")
        with serving(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p") as address:
            yield {"address": address, **_user_who_reads(address)}


def _user_who_reads(address: str) -> dict[str, str]:
    def ask(service: str, path: str = "/", method: str = "POST", **form: str) -> str:
        signed = f"AWS4-HMAC-SHA256 Credential=us/20260101/us-east-1/{service}/aws4_request, SignedHeaders=host"
        headers = {"Authorization": f"{signed}, Signature=00", "Content-Type": "application/x-www-form-urlencoded"}
        with urlopen(Request(f"http://{address}{path}", urlencode(form).encode(), headers, method=method)) as answer:
            return str(answer.read().decode())

    reads = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [reads]})
    ask("s3", "/kept", "PUT")
    ask("iam", Action="CreateUser", UserName="reader", Version="2010-05-08")
    ask("iam", Action="PutUserPolicy", UserName="reader", PolicyName="reads", PolicyDocument=policy)
    made = ask("iam", Action="CreateAccessKey", UserName="reader", Version="2010-05-08")
    key, secret = (made.split(f"<{tag}>")[1].split("<")[0] for tag in ("AccessKeyId", "SecretAccessKey"))
    return {"key": key, "secret": secret}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "ACCESS_DENIED"),
        ({"key": "AKIANOBODYKNOWSTHIS0"}, "INVALID_ACCESS_KEY_ID"),
        ({"secret": "not-the-one-it-was-given"}, "SIGNATURE_DOES_NOT_MATCH"),
    ],
    ids=["may only read", "unknown key", "wrong secret"],
)
def test_no_permission(
    strict_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], words: str
) -> None:
    """One line, without waiting, and no credential in it or in what goes to workers."""
    user = strict_server | changes
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", user["secret"])
    location = f"s3://kept/store?endpoint_override={user['address']}&scheme=http"
    begun = time.monotonic()

    with pytest.raises(StorageError, match=rf"cannot be written to \({words}: .*\); check the") as caught:
        Artifacts.open(location)

    assert time.monotonic() - begun < 10, "this is not tried again"
    place = Artifacts(location)._place
    for said in (str(caught.value), repr(caught.value.__cause__), repr(place), str(pickle.dumps(place))):
        assert user["key"] not in said
        assert user["secret"] not in said


def test_credentials_stay_where_they_are(s3_bucket: Any) -> None:
    """A pickled store holds none: workers use their own sources of credentials."""
    for pickled in (pickle.dumps(Artifacts.open(s3_bucket.uri())), pickle.dumps(locate(s3_bucket.uri()))):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert os.environ[name].encode() not in pickled


def test_an_interrupt_waits_for_the_object(proxy: Proxy, store: Artifacts, s3_bucket: Any) -> None:
    """A real SIGINT while the server has the body and has not answered."""
    hold = Fault("PUT", "hold")
    proxy.faults = [hold]
    writer = subprocess.Popen([sys.executable, "-c", PUT, store.location, "4000"], stderr=subprocess.PIPE, text=True)
    assert hold.met.wait(60)

    writer.send_signal(signal.SIGINT)
    time.sleep(0.2)
    hold.go_on.set()

    assert "KeyboardInterrupt" in writer.communicate(timeout=60)[1]
    (name,) = s3_bucket.names()
    assert s3_bucket.read(name) == bytes(range(256)) * 4000
