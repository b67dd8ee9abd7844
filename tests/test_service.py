"""The service: what `import fsu_ray` gives, and a request from Python, as README.md shows it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fsu_ray
from fsu_ray.config import differences, read_settings
from fsu_ray.errors import InvalidSamples, InvalidWeights, NotFound, UserError
from fsu_ray.method.datasets import draw, load, write_samples
from fsu_ray.method.unlearn import unlearn
from fsu_ray.recipes import Recipe
from fsu_ray.records import Behaviour, Status
from fsu_ray.service import Service
from fsu_ray.work import Outcome, WorkOrder

README = Path(__file__).parent.parent / "README.md"
EIGHT = Behaviour(name="eight", kind="class", targets=(8,))


@pytest.fixture
def notebook(home: Path, quick: Recipe) -> str:
    """The Python of the README, in a folder with samples/ and a quick recipe in fsu.toml."""
    images = load("digits", "train", (1, 32, 32))
    write_samples(images.pixels[draw(images, [8], 8, 0)], home / "samples")
    values = differences(Recipe(), quick.model_dump(mode="json"))
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (home / "fsu.toml").write_text("\n".join(["[recipe]", *lines, ""]))
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    return str(block)


def check(printed: str) -> None:
    assert "succeeded ['eight']" in printed
    with fsu_ray.connect() as service:
        assert service.models.version("m").number == 2
        assert service.audit.verify().found == 0


@pytest.mark.slow
def test_the_readmes_python_runs(
    notebook: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To its end, with the method in this process instead of on Ray."""

    @contextmanager
    def on_ray(*_: Any) -> Iterator[Any]:
        def execute(order: WorkOrder, store: Any, name: str, stop: threading.Event) -> Outcome:
            return unlearn(order, store, torch.device("cpu"))

        yield execute

    monkeypatch.setattr(Service, "on_ray", on_ray)
    exec(compile(notebook, str(README), "exec"), {})
    check(capsys.readouterr().out)


@pytest.mark.ray
def test_the_readmes_python_runs_on_ray(notebook: str, home: Path) -> None:
    """As a script of its own, which starts and stops Ray."""
    done = subprocess.run([sys.executable, "-c", notebook], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    check(done.stdout)


def test_what_is_public() -> None:
    """`__all__` is sorted, whole and literal."""
    names = fsu_ray.__all__
    assert names == sorted(names)
    assert all(hasattr(fsu_ray, name) for name in names)
    imported = {
        name for name, value in vars(fsu_ray).items() if not name.startswith("_") and hasattr(value, "__name__")
    }
    modules = {name for name in imported if f"fsu_ray.{name}" in sys.modules}
    assert imported - modules - {"annotations"} == set(names)


def test_nothing_is_opened_before_it_is_needed(home: Path) -> None:
    """`connect` opens both stores, a bare `Service` opens each on first use."""
    bare = Service(read_settings())
    assert bare.recipes.preset("digits").relearn.epochs == 20
    bare.close()
    assert not (home / ".fsu").exists()
    fsu_ray.connect().close()
    assert (home / ".fsu" / "ledger.db").exists()


def test_a_request_is_checked_before_anything_is_written(service: Service, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidWeights, match="give a safetensors file"):
        service.models.register("m", trained.spec, tmp_path / "none.safetensors")
    (tmp_path / "w").write_bytes(trained.weights)
    service.models.register("m", trained.spec, tmp_path / "w")
    with pytest.raises(InvalidSamples):
        service.requests.submit("m", EIGHT, tmp_path / "nothing")
    with pytest.raises(NotFound):
        service.requests.submit("n", EIGHT, tmp_path / "nothing")
    with pytest.raises(UserError, match="no status 'done'"):
        service.requests.all(status="done")
    assert service.requests.all() == []


def test_a_request_without_a_recipe_gets_that_of_its_model(service: Service, trained: Any, tmp_path: Path) -> None:
    """What a search found for this kind, else the preset `default`; a change can be text or a dictionary."""
    service.models.register("m", trained.spec, trained.weights)
    write_samples(trained.train.pixels[draw(trained.train, [8], 6, 0)], tmp_path / "s")
    first, new = service.requests.submit("m", EIGHT, tmp_path / "s")
    assert (new, first.recipe, first.status) == (True, Recipe(), Status.QUEUED)
    again, new = service.requests.submit("m", EIGHT, tmp_path / "s")
    assert (new, again.id) == (False, first.id)
    service.requests.cancel(first.id[:8])
    changed = service.recipes.preset("default", ["relearn.epochs=7", {"invert": {"steps": 50}}])
    assert (changed.relearn.epochs, changed.invert.steps) == (7, 50)
    service.ledger.recipes.keep("m", "class", changed, 0.9, {}, "u-1")
    later, _ = service.requests.submit("m", EIGHT, tmp_path / "s")
    assert later.recipe == changed
    assert service.requests.recipe_origin(later) is not None


def test_running_starts_no_ray_where_nothing_is_ready(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "on_ray", lambda *_: pytest.fail("Ray was started"))
    assert service.run() == []
    assert service.run_windows() == []
    with pytest.raises(NotFound):
        service.run(model="nobody")


def test_an_actor_is_an_opaque_id(service: Service, trained: Any) -> None:
    """Checked by every use case that records one, before its work begins."""
    service.models.register("m", trained.spec, trained.weights)
    calls = [
        lambda actor: service.models.recheck("m", actor),
        lambda actor: service.models.move_alias("m", "production", 1, actor),
        lambda actor: service.models.set_policy("m", service.models.policy("m"), actor),
        lambda actor: service.recipes.reset("m", "class", actor),
        lambda actor: service.recipes.search("m", behaviour=EIGHT, samples="none", actor=actor),
        lambda actor: service.generators.import_("m", b"", Recipe(), actor=actor),
        lambda actor: service.retention.collect_garbage(actor=actor),
        lambda actor: service.schedules.add("m", "0 2 * * *", actor=actor),
    ]
    for call in calls:
        with pytest.raises(UserError, match="is no opaque id"):
            call("Alice Smith <alice@example.org>")
