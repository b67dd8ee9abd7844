"""Purging, retiring, sealing, collecting garbage: what is on record as gone is really gone, and the line goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fsu_ray import retention
from fsu_ray.errors import AlreadyExists, StorageError, TransitionRefused, UserError
from fsu_ray.method.datasets import draw, write_samples
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.method.unlearn import unlearn
from fsu_ray.pipeline import Result, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Policy, Status
from fsu_ray.service import Service
from fsu_ray.storage import artifacts
from fsu_ray.storage.checkpoints import Checkpoints


@pytest.fixture
def erase(service: Service, trained: Any, quick: Recipe, tmp_path: Path) -> Callable[..., Result]:
    """Registers the model `m`; takes a class all the way, with the method in this process."""
    service.models.register("m", trained.spec, trained.weights)
    thorough = quick.model_copy(update={"relearn": quick.relearn.model_copy(update={"epochs": 12, "lr": 3e-3})})

    def go(target: int) -> Result:
        folder = tmp_path / f"class-{target}"
        write_samples(trained.train.pixels[draw(trained.train, [target], 6, 0)], folder)
        behaviour = Behaviour(name=f"class-{target}", kind="class", targets=(target,))
        service.requests.submit("m", behaviour, str(folder), thorough)
        request = service.ledger.requests.claim("tester", 60)
        assert request is not None

        def here(order: Any, store: Any, name: str, stop: threading.Event) -> Any:
            return unlearn(order, store, torch.device("cpu"))

        return run_request(service.ledger, service.artifacts, here, request)[0]

    return go


def test_samples_are_purged_at_once_where_the_policy_says_so(service: Service, erase: Callable[..., Result]) -> None:
    """Digest and probes stay, the file is gone, and later requests go on without it."""
    service.ledger.models.set_policy("m", Policy(samples_days=0))
    first = erase(8).request
    assert not service.artifacts.has(first.samples)
    (erasure,) = service.ledger.models.erasures("m")
    assert erasure.samples == first.samples
    assert service.artifacts.has(erasure.probes)
    second = erase(3)
    assert second.request.status is Status.SUCCEEDED
    assert second.outcome
    assert [prior["behaviour"] for prior in second.report["earlier"]] == ["class-8"]


def test_samples_are_kept_for_as_long_as_the_policy_says(service: Service, erase: Callable[..., Result]) -> None:
    """Not purged before their time, nor while another request needs them."""
    request = erase(8).request
    assert service.ledger.requests.due_samples() == [], "no policy: never"
    service.ledger.models.set_policy("m", Policy(samples_days=3))
    assert service.ledger.requests.due_samples() == []
    service.ledger.models.set_policy("m", Policy(samples_days=0))
    again, _ = service.ledger.requests.submit(
        "m", Behaviour(name="other", kind="subset", targets=(1,)), request.samples, 6, Recipe()
    )
    assert service.ledger.requests.due_samples() == []
    with pytest.raises(TransitionRefused, match=f"needed by {again.id}"):
        service.ledger.requests.purge(request)
    service.ledger.requests.cancel(again.id)
    assert {due.id for due in service.ledger.requests.due_samples()} == {request.id, again.id}
    retention.tidy(service.ledger, service.artifacts)
    assert not service.artifacts.has(request.samples)
    assert service.ledger.requests.due_samples() == []


def test_samples_that_come_again_are_needed_again(
    service: Service, erase: Callable[..., Result], tmp_path: Path
) -> None:
    """The same bytes under a later request are no leftover of the purge."""
    service.ledger.models.set_policy("m", Policy(samples_days=0))
    request = erase(8).request
    other = Behaviour(name="other", kind="subset", targets=(1,))
    service.requests.submit("m", other, str(tmp_path / "class-8"), Recipe())
    needed, removed = service.ledger.references()
    assert request.samples in needed
    assert request.samples not in removed
    assert service.artifacts.has(request.samples)


def test_a_retired_generator_is_gone_and_offered_no_more(service: Service, erase: Callable[..., Result]) -> None:
    """The next request trains anew; the earlier erasure's mask is rebuilt on its D'."""
    erase(8)
    (old,) = service.ledger.generators.all("m")
    retired = retention.retire(service.ledger, service.artifacts, old.id, "operator", "alice")
    assert retired.retired == "operator"
    assert not service.artifacts.has(old.weights)
    assert not service.artifacts.has(old.dataset)
    with pytest.raises(AlreadyExists, match="retired already"):
        service.ledger.generators.retire(old.id)
    later = erase(3)
    assert later.request.status is Status.SUCCEEDED
    assert later.outcome
    assert later.outcome.generator_use == "trained"


def test_a_generator_is_not_retired_under_a_run(service: Service, erase: Callable[..., Result]) -> None:
    """It may be what the run works with."""
    erase(8)
    service.ledger.requests.submit("m", Behaviour(name="x", kind="class", targets=(1,)), "0" * 64, 1, Recipe())
    assert service.ledger.requests.claim("w", 60)
    (generator,) = service.ledger.generators.all("m")
    with pytest.raises(TransitionRefused, match="is running"):
        service.ledger.generators.retire(generator.id)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy(generators="retire-after-erasure"), "erasure"),
        (Policy(generators="max-age", generator_days=1e-9), "age"),
        (Policy(generators="max-age", generator_days=9), None),
        (Policy(), None),
    ],
)
def test_policies_retire_generators(
    service: Service, erase: Callable[..., Result], policy: Policy, why: str | None
) -> None:
    """After the erasure that taints them, or when they are old."""
    service.ledger.models.set_policy("m", policy)
    erase(8)
    (generator,) = service.ledger.generators.all("m")
    assert (generator.retired, generator.taints) == (why, 1)
    assert service.artifacts.has(generator.dataset) == (why is None)


class TestSeal:
    def test_what_was_erased_is_in_d_prime_no_more(self, service: Service, erase: Callable[..., Result]) -> None:
        """Neither samples nor label mass; the old D' and G are gone, the probes stay."""
        erase(8)
        (old,) = service.ledger.generators.all("m")
        before = Synthetic.from_bytes(service.artifacts.get(old.dataset))
        sealed = service.generators.seal(old.id, "alice")
        assert (sealed.sealed, sealed.taints) == (2, 0)
        assert not service.artifacts.has(old.dataset)
        assert not service.artifacts.has(old.weights)
        after = Synthetic.from_bytes(service.artifacts.get(sealed.dataset))
        (erasure,) = service.ledger.models.erasures("m")
        assert len(after) == len(before) - erasure.report["forgetting"]["probes"]
        assert float(after.logits.softmax(1)[:, 8].max()) == 0.0
        assert bool((after.predicted != 8).all())
        assert service.artifacts.has(erasure.probes)

    def test_later_requests_go_on_from_it(self, service: Service, erase: Callable[..., Result]) -> None:
        """The sealed D' is reused, the sealed version labels, earlier probes are still measured."""
        erase(8)
        service.generators.seal(service.ledger.generators.all("m")[0].id, "alice")
        second, third = erase(3), erase(5)
        for result in (second, third):
            assert result.request.status is Status.SUCCEEDED
            assert result.outcome
            assert result.outcome.generator_use == "reused"
        assert third.outcome
        earlier = {prior["behaviour"]: prior["probes_in_target"] for prior in third.report["earlier"]}
        assert set(earlier) == {"class-8", "class-3"}
        assert max(earlier.values()) < 0.2
        assert [v.root for v in service.ledger.models.versions("m")] == [1, 1, 1, 1]

    def test_the_roots_weights_go_too_where_the_policy_says_so(
        self, service: Service, erase: Callable[..., Result]
    ) -> None:
        """A later request works without them, even if it must train a generator anew."""
        service.ledger.models.set_policy("m", Policy(seal="root"))
        erase(8)
        root = service.ledger.models.version("m", 1)
        service.ledger.models.move_alias("m", "production", 1, force=True, reason="TICKET-1")
        (generator,) = service.ledger.generators.all("m")
        with pytest.raises(UserError, match="alias 'production' points to the root"):
            service.generators.seal(generator.id, "alice")
        assert service.artifacts.has(root.weights)
        service.ledger.models.move_alias("m", "production", 2)
        service.generators.seal(generator.id, "alice")
        assert not service.artifacts.has(root.weights)
        retention.retire(service.ledger, service.artifacts, generator.id, "operator", "alice")
        later = erase(3)
        assert later.request.status is Status.SUCCEEDED, later.request.reason
        assert service.ledger.generators.all("m")[-1].root == 2

    def test_it_is_refused_where_it_makes_no_sense(self, service: Service, erase: Callable[..., Result]) -> None:
        """Twice, or of a D' with the labels of an older root."""
        erase(8)
        (generator,) = service.ledger.generators.all("m")
        service.generators.seal(generator.id, "alice")
        with pytest.raises(AlreadyExists, match="is sealed already"):
            service.generators.seal(generator.id, "alice")
        service.models.update("m", service.artifacts.get(service.ledger.models.version("m").weights))
        with pytest.raises(UserError, match="has the labels of version"):
            service.generators.seal(generator.id, "alice")


def runs_of(service: Service) -> Checkpoints:
    return Checkpoints(service.settings.runs)


class TestDeletableFiles:
    def test_checkpoints_go_when_what_they_served_is_over(self, service: Service, erase: Callable[..., Result]) -> None:
        """Those of a request that lives stay, and so does what is of another ledger, or of nobody known."""
        ended, _ = service.ledger.requests.submit(
            "m", Behaviour(name="x", kind="class", targets=(1,)), "0" * 64, 1, Recipe()
        )
        service.ledger.requests.cancel(ended.id)
        waits, _ = service.ledger.requests.submit(
            "m", Behaviour(name="y", kind="class", targets=(2,)), "0" * 64, 1, Recipe()
        )
        names = [f"{ended.id}-0123abcd", f"{waits.id}-0123abcd", "r-0123456789-0123abcd", "search-0123456789abcdef"]
        names += ["search-mine", "notes"]
        for name in names:
            folder = Path(service.settings.runs) / name / "checkpoint_1"
            folder.mkdir(parents=True)
            (folder / "state.pt").write_bytes(b"1234")
        runs = runs_of(service)
        assert retention.garbage(service.ledger, service.artifacts, runs).checkpoints == {names[0]: 4}
        files = retention.garbage(service.ledger, service.artifacts, runs, timedelta(0))
        assert files.checkpoints == {names[0]: 4, names[3]: 4}
        retention.collect(service.ledger, service.artifacts, runs, files, "alice")
        assert {folder.name for folder in Path(service.settings.runs).iterdir()} == set(names) - set(files.checkpoints)
        retention.collect(service.ledger, service.artifacts, runs, files, "alice")  # somebody else was faster

    def test_only_what_nothing_refers_to_is_deleted(self, service: Service, erase: Callable[..., Result]) -> None:
        """And only when it is old; a dry run deletes nothing."""
        erase(8)
        stray = service.artifacts.put(b"nobody's")
        kept = set(service.artifacts.digests()) - {stray}
        assert retention.garbage(service.ledger, service.artifacts, runs_of(service)).stray == {}, (
            "it may be in use for all we know"
        )
        files = retention.garbage(service.ledger, service.artifacts, runs_of(service), timedelta(0))
        assert stray in files.stray
        needed, _ = service.ledger.references()
        assert needed.isdisjoint(files.stray)
        assert service.artifacts.has(stray)
        retention.collect(service.ledger, service.artifacts, runs_of(service), files, "alice")
        assert set(service.artifacts.digests()) == kept - set(files.stray)
        assert all(service.artifacts.has(digest) for digest in needed)

    def test_a_running_request_keeps_what_it_writes(self, service: Service, erase: Callable[..., Result]) -> None:
        """Its artifacts are not in the ledger yet."""
        erase(8)
        service.ledger.requests.submit("m", Behaviour(name="x", kind="class", targets=(1,)), "0" * 64, 1, Recipe())
        assert service.ledger.requests.claim("w", 60)
        fresh = service.artifacts.put(b"relearned just now")
        assert fresh not in retention.garbage(service.ledger, service.artifacts, runs_of(service), timedelta(0)).stray

    def test_what_is_on_record_as_removed_is_deleted_after_a_crash(
        self, service: Service, erase: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The row was written, the file was not deleted: the next collection does it."""
        request = erase(8).request
        service.ledger.requests.purge(request)
        assert service.artifacts.has(request.samples)
        files = retention.garbage(service.ledger, service.artifacts, runs_of(service))
        assert set(files.late) == {request.samples}
        retention.collect(service.ledger, service.artifacts, runs_of(service), files, "alice")
        assert not service.artifacts.has(request.samples)

    def test_a_file_that_cannot_be_deleted_is_an_error(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        """One line, and nothing is said to be gone."""
        digest = service.artifacts.put(b"x")

        def refuse(*_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(artifacts, "_sync", refuse)
        with pytest.raises(StorageError, match=f"{digest} cannot be deleted \\(Permission denied\\)"):
            service.artifacts.delete(digest)
