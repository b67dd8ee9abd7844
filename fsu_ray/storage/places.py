"""Locations as people write them: reading a URI of S3 or Google Cloud Storage into a `Bucket`. Nothing is opened here.

    s3://BUCKET/PREFIX[?region=R&endpoint_override=HOST:PORT&scheme=http]
    gs://[anonymous@]BUCKET/PREFIX[?endpoint_override=HOST:PORT&scheme=http]

Options that an s3:// URI leaves out come from the environment, then from the profile, as with Amazon's own tools. A URI
that holds credentials is refused, and no message repeats them: credentials come from the service's usual sources only.
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
_SERVICES = (  # error messages of Amazon's and of Google's client: the code and its explanation
    re.compile(r"AWS Error (\w+) during \w+ operation: (.*?)(?: \(Request ID: .*)?$"),
    re.compile(r"google::cloud::Status\((\w+): (.*?)(?: error_info=.*|\))$"),
)
_CURL = re.compile(r"curlCode: \d+, [^;]*; Details: ")


@dataclass(frozen=True)
class Bucket:
    """A location in a bucket. `path` is `bucket/prefix`; for None the service's own default applies."""

    kind: str
    path: str
    region: str | None = None
    endpoint: str | None = None
    scheme: str | None = None
    anonymous: bool = False

    @property
    def uri(self) -> str:
        """The URI that `read` reads as this bucket in any environment."""
        options = {"region": self.region, "endpoint_override": self.endpoint, "scheme": self.scheme}
        query = urlencode({name: value for name, value in options.items() if value}, safe=":")
        user = "anonymous@" if self.anonymous else ""
        return f"{self.kind}://{user}{quote(self.path)}{'?' if query else ''}{query}"


def read(location: str, environment: Mapping[str, str] = os.environ) -> Bucket | None:
    """The bucket that `location` names; None where it is a folder or a URI of another kind.

    Raises StorageError for a URI that holds credentials, has an unknown option, or names no bucket.
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
        url = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
        from_url, endpoint = _endpoint(url or profile.get("endpoint_url"))
        scheme = scheme or from_url
    region = options.get("region") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    return Bucket(kind, path, region or profile.get("region"), endpoint, scheme)


def shown(location: str) -> str:
    """A location for messages: without a user, a password or options."""
    if "://" not in location:
        return repr(location)
    parts = _split(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def cause(error: Exception) -> str:
    """The reason of an error on one line, as the system or the service gives it."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    for service in _SERVICES:
        if match := service.search(line):
            return f"{match[1]}: {_CURL.sub('', match[2])}"
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else line


def _split(location: str) -> SplitResult:
    try:
        return urlsplit(location, allow_fragments=False)
    except ValueError:
        raise StorageError("a location with :// is not a URI; give an absolute folder or s3://BUCKET/PREFIX") from None


def _endpoint(text: str | None) -> tuple[str | None, str | None]:
    """The scheme and the host of an endpoint, which may be given as a URL or as a host alone."""
    if not text:
        return None, None
    parts = _split(text if "://" in text else f"//{text}")
    if parts.username is not None:
        raise StorageError("the endpoint holds credentials; give it as HOST:PORT or as http://HOST:PORT")
    return parts.scheme or None, parts.netloc


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """The options of the chosen profile in Amazon's configuration file."""
    name = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or "default"
    file = configparser.RawConfigParser()
    try:
        file.read(Path(environment.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser())
        return dict(file.items(name if name == "default" else f"profile {name}"))
    except (configparser.Error, OSError, UnicodeDecodeError, RuntimeError):  # no such profile, no such file
        return {}
