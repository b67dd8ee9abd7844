"""Where things lie: what people write, read into a bucket of S3 or of Google Cloud Storage. Nothing is opened here.

    s3://BUCKET/PREFIX[?region=R&endpoint_override=HOST:PORT&scheme=http]
    gs://[anonymous@]BUCKET/PREFIX[?endpoint_override=HOST:PORT&scheme=http]

What an s3:// URI leaves out comes from where Amazon's own tools take it: the environment, then the profile. A URI
that holds credentials is refused, and no message repeats them: they come from the usual chain alone.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from fsu_ray.errors import StorageError

_OPTIONS = {"s3": ("region", "endpoint_override", "scheme"), "gs": ("endpoint_override", "scheme")}
_SECRET = re.compile("key|secret|token|password|credential|signature|^sig$", re.IGNORECASE)
_SERVICES = (  # what matters in the words of Amazon's and of Google's client
    re.compile(r"AWS Error (\w+) during \w+ operation: (.*?)(?: \(Request ID: .*)?$"),
    re.compile(r"google::cloud::Status\((\w+): (.*?)(?: error_info=.*|\))$"),
)
_CURL = re.compile(r"curlCode: \d+, [^;]*; Details: ")


@dataclass(frozen=True)
class Bucket:
    """A place in a bucket. `path` is `bucket/prefix`; what is None is left to the service's own default."""

    kind: str
    path: str
    region: str | None = None
    endpoint: str | None = None
    scheme: str | None = None
    anonymous: bool = False

    @property
    def uri(self) -> str:
        """What `read` reads as this very bucket, in any environment."""
        given = {"region": self.region, "endpoint_override": self.endpoint, "scheme": self.scheme}
        query = urlencode({name: value for name, value in given.items() if value}, safe=":")
        user = "anonymous@" if self.anonymous else ""
        return f"{self.kind}://{user}{quote(self.path)}{'?' if query else ''}{query}"


def read(location: str, environment: Mapping[str, str] = os.environ) -> Bucket | None:
    """The bucket that `location` names; None where it is a folder or a URI of another kind.

    Raises StorageError for a URI that holds credentials, an option that there is not, or no bucket.
    """
    if "://" not in location:
        return None
    parts = _split(location)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    kind, anonymous = parts.scheme, parts.scheme == "gs" and parts.username == "anonymous"
    secret = parts.password is not None or (kind in _OPTIONS and parts.username is not None and not anonymous)
    if secret or any(_SECRET.search(name) for name in options):
        raise StorageError(
            f"the {kind}:// location holds credentials; take them out: they come from the environment "
            "(such as AWS_ACCESS_KEY_ID), from a profile or from the machine's role"
        )
    if kind not in _OPTIONS:
        return None
    surplus = sorted(options.keys() - set(_OPTIONS[kind]))
    if surplus:
        raise StorageError(f"{shown(location)}: unknown option {surplus[0]!r}; it takes {', '.join(_OPTIONS[kind])}")
    path = unquote(parts.netloc.rpartition("@")[2] + parts.path).strip("/")
    if not parts.netloc.rpartition("@")[2]:
        raise StorageError(f"{shown(location)} names no bucket; give {kind}://BUCKET/PREFIX")
    scheme, endpoint = _endpoint(options.get("endpoint_override") or None)
    scheme = options.get("scheme") or scheme
    if kind == "gs":
        return Bucket(kind, path, None, endpoint, scheme, anonymous)
    profile = _profile(environment)
    if endpoint is None:
        found = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        from_url, endpoint = _endpoint(found or profile.get("endpoint_url"))
        scheme = scheme or from_url
    region = options.get("region") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    return Bucket(kind, path, region or profile.get("region"), endpoint, scheme)


def shown(location: str) -> str:
    """A location as messages name it: without a user, a password or options."""
    if "://" not in location:
        return repr(location)
    parts = _split(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def cause(error: Exception) -> str:
    """What went wrong, in the words of the system or of the service, on one line."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    for service in _SERVICES:
        if found := service.search(line):
            return f"{found[1]}: {_CURL.sub('', found[2])}"
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else line


def _split(location: str) -> SplitResult:
    try:
        return urlsplit(location, allow_fragments=False)
    except ValueError:
        raise StorageError("a location with :// is not a URI; give an absolute folder or s3://BUCKET/PREFIX") from None


def _endpoint(text: str | None) -> tuple[str | None, str | None]:
    """The protocol and the host of an endpoint, which may be given as a URL or as a host alone."""
    if not text:
        return None, None
    parts = _split(text if "://" in text else f"//{text}")
    if parts.username is not None:
        raise StorageError("the endpoint holds credentials; give it as HOST:PORT or as http://HOST:PORT")
    return parts.scheme or None, parts.netloc


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """What Amazon's configuration file says of the chosen profile."""
    name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or "default"
    file = configparser.RawConfigParser()
    try:
        file.read(Path(environment.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser())
        return dict(file.items(name if name == "default" else f"profile {name}"))
    except (configparser.Error, OSError, UnicodeDecodeError, RuntimeError):  # no such profile, no such file
        return {}
