"""Locations as people write them; no message repeats a secret in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsu_ray.errors import StorageError
from fsu_ray.storage.places import Bucket, cause, read, shown

NONE = {"AWS_CONFIG_FILE": "/dev/null"}


@pytest.mark.parametrize("location", ["/shared/a", "relative", "file:///shared/a", "hdfs://host/a", ""])
def test_only_two_kinds_are_buckets(location: str) -> None:
    """pyarrow reads other URIs."""
    assert read(location, NONE) is None


@pytest.mark.parametrize(
    ("location", "bucket"),
    [
        ("s3://b", Bucket("s3", "b")),
        ("s3://b/", Bucket("s3", "b")),
        ("s3://b/a%20b/c/", Bucket("s3", "b/a b/c")),
        ("s3://b/p?region=eu-west-1", Bucket("s3", "b/p", "eu-west-1")),
        ("s3://b/p?endpoint_override=h:9000&scheme=http", Bucket("s3", "b/p", None, "h:9000", "http")),
        ("s3://b/p?endpoint_override=http://h:9000", Bucket("s3", "b/p", None, "h:9000", "http")),
        ("gs://b/p", Bucket("gs", "b/p")),
        ("gs://anonymous@b/p?endpoint_override=h:1", Bucket("gs", "b/p", None, "h:1", None, True)),
    ],
)
def test_a_uri_is_read_and_written_again(location: str, bucket: Bucket) -> None:
    """`read` reads a written URI as the same bucket."""
    assert read(location, NONE) == bucket
    assert read(bucket.uri, NONE) == bucket


def test_the_environment_completes_a_uri(tmp_path: Path) -> None:
    """The URI first, then the variables of Amazon's tools, then the profile."""
    profile = tmp_path / "config"
    profile.write_text("[default]\nregion = one\n[profile work]\nregion = two\nendpoint_url = https://three:9000\n")
    environment = {"AWS_CONFIG_FILE": str(profile)}
    assert read("s3://b", environment) == Bucket("s3", "b", "one")
    environment["AWS_PROFILE"] = "work"
    assert read("s3://b", environment) == Bucket("s3", "b", "two", "three:9000", "https")
    environment["AWS_DEFAULT_REGION"] = "four"
    environment["AWS_ENDPOINT_URL"] = "http://five"
    assert read("s3://b", environment) == Bucket("s3", "b", "four", "five", "http")
    environment["AWS_REGION"] = "six"
    environment["AWS_ENDPOINT_URL_S3"] = "http://seven"
    assert read("s3://b", environment) == Bucket("s3", "b", "six", "seven", "http")
    said = read("s3://b?region=r&endpoint_override=e&scheme=https", environment)
    assert said == Bucket("s3", "b", "r", "e", "https")
    assert read(said.uri, {}) == said, "and so in any environment"
    assert read("gs://b", environment) == Bucket("gs", "b")


@pytest.mark.parametrize(
    "location",
    [
        "s3://AKIAKEY:hunter2@b/p",
        "s3://hunter2@b/p",
        "s3://b/p?access_key=A&secret_key=hunter2",
        "s3://b/p?session_token=hunter2",
        "gs://hunter2@b/p",
        "gs://anonymous:hunter2@b/p",
        "gs://b/p?access_token=hunter2",
        "abfs://account:hunter2@container/p",
        "nosuch://b/p?sig=hunter2",
        "s3://b/p?endpoint_override=http://me:hunter2@h:9000",
        "s3://b/p?hunter2",
        "s3://b/p?surplus=hunter2",
        "s3://[hunter2",
        "s3://?region=hunter2",
    ],
)
def test_a_wrong_uri_is_refused_and_not_repeated(location: str) -> None:
    """One line that says what to do, without any secret."""
    with pytest.raises(StorageError) as caught:
        read(location, NONE)
    said = str(caught.value)
    assert "\n" not in said
    assert "give" in said or "take" in said
    if location != "s3://b/p?hunter2":  # it is the name of an option
        assert "hunter2" not in said
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or "hunter2" not in str(caught.value.__context__)


def test_an_endpoint_with_credentials_is_refused() -> None:
    """From every source."""
    with pytest.raises(StorageError, match="endpoint holds credentials") as caught:
        read("s3://b", {**NONE, "AWS_ENDPOINT_URL": "http://me:hunter2@h"})
    assert "hunter2" not in str(caught.value)


def test_messages_name_a_place_without_its_options() -> None:
    assert shown("s3://b/p?endpoint_override=h") == "s3://b/p"
    assert shown("hdfs://me@h/p") == "hdfs://h/p"
    assert shown("/a b") == "'/a b'"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "full"), "No space left on device"),
        (OSError("one\ntwo"), "one"),
        (OSError(), "OSError"),
        (
            OSError(
                "When uploading object with key 'p/x' in bucket 'nob': AWS Error NO_SUCH_BUCKET during PutObject "
                "operation: The specified bucket does not exist (Request ID: qhb)"
            ),
            "NO_SUCH_BUCKET: The specified bucket does not exist",
        ),
        (
            OSError(
                "When a: AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Could not connect to "
                "server; Details: Failed to connect to 127.0.0.1:1 after 0 ms: Could not connect to server"
            ),
            "NETWORK_CONNECTION: Failed to connect to 127.0.0.1:1 after 0 ms: Could not connect to server",
        ),
        (
            OSError(
                "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of X error_info={a=, "
                "metadata={b=c}})"
            ),
            "UNAVAILABLE: Retry policy exhausted, with a last message of X",
        ),
    ],
)
def test_a_cause_is_one_short_line(error: OSError, said: str) -> None:
    assert cause(error) == said
