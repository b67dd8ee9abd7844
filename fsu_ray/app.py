"""The composition root: the only place that opens a ledger, an artifact store or a Ray cluster.

The command line and the jobs come through `App`; what it does is in `pipeline`, `storage` and `method`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsu_ray.config import CHECKPOINT_STEPS, Settings, change_recipe, differences, make_recipe, read_settings
from fsu_ray.errors import AlreadyExists, FsuError, InvalidData, InvalidSamples, InvalidWeights, NotFound, UserError
from fsu_ray.pipeline import Execute, Result, WorkerOptions, drain, run_request
from fsu_ray.recipes import Recipe
from fsu_ray.records import (
    Behaviour,
    Generator,
    Kind,
    Model,
    ModelSpec,
    ModelVersion,
    Request,
    SearchedRecipe,
    Status,
    Terms,
)
from fsu_ray.retention import destroy
from fsu_ray.storage.artifacts import Artifacts, locate
from fsu_ray.storage.ledger import Ledger, open_ledger
from fsu_ray.work import BlobStore, ErasureTarget, Outcome, WorkOrder

log = logging.getLogger(__name__)
ProgressCallback = Any  # (stage, done, total, figures) -> None


@dataclass(frozen=True)
class ResolvedRecipe:
    """The recipe that a request is to have, and where it is from: a search of its model, else a preset.

    `named` says whether somebody asked for it, by a preset's name or by changes, and `changed` whether by these.
    `passed_over` are the keys of the [recipe] table of fsu.toml of which a searched recipe has values of its own.
    """

    recipe: Recipe
    search: SearchedRecipe | None
    preset: str | None
    named: bool
    changed: bool
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class App:
    """One ledger and one artifact store, opened from `settings`."""

    settings: Settings
    ledger: Ledger
    artifacts: Artifacts

    @classmethod
    def open(cls, settings: Settings | None = None) -> App:
        """Open what the settings name, making it on first use; raises InvalidConfig or StorageError."""
        settings = settings or read_settings()
        return cls(settings, open_ledger(settings.ledger), Artifacts.open(settings.artifacts))

    def recipe(self, preset: str = "default", changes: tuple[dict[str, Any], ...] = ()) -> Recipe:
        """The recipe `preset` under the [recipe] table of fsu.toml and `changes`."""
        return make_recipe(preset, [self.settings.recipe, *changes])

    def recipe_for(
        self, model: str, kind: Kind, preset: str | None = None, changes: tuple[dict[str, Any], ...] = ()
    ) -> ResolvedRecipe:
        """The recipe of a request: `preset` where one is named, else what a search found for this kind of requests of
        the model, else the preset `default`; `changes` lie on top of any.

        The [recipe] table of fsu.toml lies on presets alone. A searched recipe is taken whole, as it was measured: what
        the table said at the time of the search is in it already, and what it says since is passed over. Raises
        NotFound, InvalidConfig for a preset or a value that is none, UserError for a kind that is none.
        """
        named, changed = preset is not None or bool(changes), bool(changes)
        search = self.ledger.recipes.in_force(model, kind) if preset is None else None
        if search is None or search.recipe is None:
            return ResolvedRecipe(self.recipe(preset or "default", changes), None, preset or "default", named, changed)
        recipe = change_recipe(search.recipe, changes)
        return ResolvedRecipe(recipe, search, None, named, changed, tuple(differences(recipe, self.settings.recipe)))

    def register(self, name: str, spec: ModelSpec, weights: bytes, test_set: str | None = None) -> Model:
        """Register a model line; the weights are tried on the architecture before anything is written."""
        from fsu_ray.method.datasets import NAMED
        from fsu_ray.models.classifier import Classifier

        self.ledger.models.check_name_free(name)
        Classifier.from_bytes(spec, weights)
        if test_set is not None:
            self._try_test_set(test_set, spec)
            place = Path(test_set).expanduser()
            test_set = str(place.resolve()) if test_set not in NAMED and place.exists() else test_set
        return self.ledger.models.register(name, spec, self.artifacts.put(weights), test_set)

    def update(self, name: str, weights: bytes) -> ModelVersion:
        """Add a version that was trained further outside; it is the root of what is erased from now on."""
        from fsu_ray.models.classifier import Classifier

        model = self.ledger.models.get(name)
        Classifier.from_bytes(model.spec, weights)
        return self.ledger.models.add_version(name, self.artifacts.put(weights))

    def _try_test_set(self, name: str, spec: ModelSpec) -> None:
        from fsu_ray.method.datasets import load

        labels = load(name, "test", spec.shape).labels
        if int(labels.max()) >= spec.classes:
            raise InvalidData(
                f"test set {name} has the class {int(labels.max())}, the model has {spec.classes} classes"
            )

    def submit(
        self,
        name: str,
        behaviour: Behaviour,
        samples: str,
        recipe: Recipe | ResolvedRecipe,
        terms: Terms | None = None,
    ) -> tuple[Request, bool]:
        """Queue a request; returns it and whether it is new. Samples are read and checked first."""
        chosen, named = (recipe.recipe, recipe.named) if isinstance(recipe, ResolvedRecipe) else (recipe, True)
        self.ledger.requests.check_behaviour(name, behaviour)
        self.ledger.requests.check_generator(name, chosen, terms or Terms())
        digest, number = self.keep_samples(name, samples)
        return self.ledger.requests.submit(name, behaviour, digest, number, chosen, terms, named=named)

    def keep_samples(self, name: str, samples: str) -> tuple[str, int]:
        """Read target samples for model `name` and store them: their digest and number; raises InvalidSamples."""
        from fsu_ray.method.datasets import read_samples
        from fsu_ray.method.inputs import save_samples

        pixels = read_samples(samples, self.ledger.models.get(name).spec.shape)
        return self.artifacts.put(save_samples(pixels)), len(pixels)

    def import_generator(
        self,
        name: str,
        weights: bytes,
        recipe: Recipe,
        latent: int | None,
        actor: str,
        on_progress: ProgressCallback = None,
    ) -> Generator:
        """Keep the generator with these weights (safetensors) for the line `name`, with a D' drawn in this process.

        `latent`: the dimensions of its z, those of `recipe` where None. Raises InvalidWeights where it does not fit
        the model, and what `Ledger.generators.add_imported` raises.
        """
        from fsu_ray.method.generators import adopt
        from fsu_ray.method.precision import default_device

        if recipe.form == "paper":
            raise UserError("the paper's form draws D' anew from each version: import for another recipe")
        self.ledger.generators.check_import(name, hashlib.sha256(weights).hexdigest(), recipe)
        state = self.ledger.lineage(name)
        size, device = latent or recipe.invert.latent, default_device()
        found = adopt(self.artifacts, state.order((), recipe), weights, size, device, on_progress)
        return self.ledger.generators.add_imported(
            name, state.root, recipe, found.weights, found.dataset, found.metrics, actor
        )

    def seal(self, generator: str, actor: str) -> Generator:
        """Write the masks of a line into the D' of a generator, and destroy what could still draw the erased.

        Raises NotFound, AlreadyExists, TransitionRefused as `Ledger.generators.seal` does, and UserError where there is
        no mask to write, D' has the labels of an older root, or an alias points to the root that is to be destroyed.
        """
        from fsu_ray.method.seal import seal

        found = self.ledger.generators.get(generator)
        state = self.ledger.lineage(found.model)
        model, base, root, masks = state.model, state.base, state.root, state.earlier_erasures
        if (found.sealed or found.root) != root.number:
            raise UserError(f"generator {found.id} has the labels of version {found.root}; seal one of {root.number}")
        if not masks:
            raise UserError(f"nothing is erased from {model.name!r} yet: there is no mask to write")
        pointing = [
            alias for alias, move in self.ledger.models.aliases(model.name).items() if move.version == base.root
        ]
        if pointing and self.ledger.models.policy(model.name).seal == "root":
            raise UserError(f"alias {pointing[0]!r} points to the root, which is to be destroyed; move it first")
        if found.sealed or found.retired:
            raise AlreadyExists(f"generator {found.id} is {'retired' if found.retired else 'sealed'} already")
        dataset = seal(self.artifacts, model.spec, root.weights, found.dataset, masks)
        destroy(self.artifacts, self.ledger.generators.seal(found, base, dataset, actor))
        return self.ledger.generators.get(found.id)

    def train(
        self,
        data: str,
        arch: str,
        epochs: int,
        seed: int,
        shape: tuple[int, int, int] | None = None,
        on_progress: ProgressCallback = None,
    ) -> tuple[ModelSpec, bytes]:
        """Train a classifier on `data` in this process: its spec and its weights as safetensors."""
        import torch

        from fsu_ray.method.datasets import load
        from fsu_ray.method.fit import TrainingSchedule, fit
        from fsu_ray.method.precision import default_device
        from fsu_ray.models.classifier import Classifier

        shape = shape or ((3, 32, 32) if data == "cifar10" else (1, 32, 32))
        images = load(data, "train", shape)
        unit = images.pixels.float() / 255
        spec = ModelSpec(
            arch=arch,
            channels=shape[0],
            height=shape[1],
            width=shape[2],
            classes=int(images.labels.max()) + 1,
            mean=tuple(round(float(v), 4) for v in unit.mean((0, 2, 3))),
            std=tuple(max(round(float(v), 4), 0.01) for v in unit.std((0, 2, 3))),
            flip=data == "cifar10",
        )
        torch.manual_seed(seed)
        classifier = Classifier(spec).to(default_device())
        schedule = TrainingSchedule(epochs=epochs, batch=min(128, max(16, len(images) // 20)), seed=seed)
        fit(classifier, images.pixels, images.labels, schedule, flip=spec.flip, on_epoch=on_progress)
        return spec, classifier.to_bytes()

    def search_order(self, name: str, asked: ErasureTarget, recipe: Recipe) -> WorkOrder:
        """What a search for a recipe to erase `asked` from the latest version of model `name` works on, `recipe`
        being the one that it begins with. Raises NotFound, and UserError for what cannot be searched."""
        from fsu_ray.method.inputs import load_samples

        self.ledger.requests.check_behaviour(name, asked.behaviour)
        if recipe.form == "paper":
            raise UserError("a search needs the continual form: the paper's draws its D' anew from each version")
        if len(load_samples(self.artifacts.get(asked.samples))) < 2:
            raise InvalidSamples("a search holds some of the target samples out: give at least two")
        return self.ledger.lineage(name).order((asked,), recipe)

    def search(
        self,
        model: str,
        order: WorkOrder,
        wanted: Any,
        actor: str,
        on_progress: ProgressCallback,
        cpus: int | None = None,
    ) -> Any:
        """Search for a recipe for `order` on Ray (`search.Wanted`), and keep what is better than the one it began with
        for the later requests of the line: what was found (`search.Found`), and its record or None."""
        from fsu_ray.search import search

        with self.on_ray(on_progress, cpus, number=1):
            found = search(order, self.artifacts, locate(self.settings.runs), wanted, on_progress)
        if not found.better:
            return found, None
        kind = order.targets[0].behaviour.kind
        known = self.ledger.recipes.in_force(model, kind)
        if known is not None and known.evidence.get("name") == found.evidence["name"]:
            return found, known  # the same search again
        return found, self.ledger.recipes.keep(model, kind, found.recipe, found.score, found.evidence, actor)

    @contextmanager
    def on_ray(
        self, on_progress: ProgressCallback, cpus: int | None = None, parallel: int = 1, number: int | None = None
    ) -> Iterator[Execute]:
        """An `execute` for the pipeline that runs on the cluster of RAY_ADDRESS, or on one of its own; `parallel` runs
        of `number` workers each (the settings' where it is None) share its CPUs. Raises UserError where it will never
        have as many."""
        size = number or self.settings.workers
        from fsu_ray.cluster import workers
        from fsu_ray.cluster.metrics import MetricsExporter

        runs = locate(self.settings.runs)
        workers.connect(cpus)
        try:
            workers.resources(size, parallel)
            with MetricsExporter(self.ledger.requests.stats) as feed:

                def execute(order: WorkOrder, store: BlobStore, name: str, stop: threading.Event) -> Outcome:
                    outcome = workers.execute(
                        order, store, runs, name, CHECKPOINT_STEPS, on_progress, stop, parallel, size
                    )
                    feed.stages(outcome.seconds)
                    return outcome

                yield execute
        finally:
            workers.disconnect()

    def reconcile(self) -> list[Request]:
        """End the claims of Ray jobs that have died, where RAY_ADDRESS names a cluster whose head can be asked: the
        requests, which can be claimed now. With Ray's own cluster of this process there is nothing to ask."""
        if not os.environ.get("RAY_ADDRESS"):
            return []
        from fsu_ray.cluster.jobs import JobsClient, job_of
        from fsu_ray.dispatch import reconcile

        if not any(job_of(request.worker) for request in self.ledger.requests.all(status=Status.RUNNING)):
            return []
        try:
            return reconcile(self.ledger, JobsClient())
        except FsuError as error:  # a head without a Jobs API: the claims end with their leases
            log.info("jobs were not looked for: %s", error)
            return []

    def expect(self, request: str) -> None:
        """Raise NotFound where the ledger is not the one that has this request: a job that was sent elsewhere."""
        try:
            self.ledger.requests.get(request)
        except NotFound:
            raise NotFound(
                f"the ledger of this job has no request {request}: it is not that of the sender; let the cluster have "
                "the same FSU_LEDGER, or a folder (FSU_HOME) that it shares with the sender"
            ) from None

    def run(self, execute: Execute, wanted: WorkerOptions | None = None, started: Any = None) -> list[Result]:
        """Claim and carry out what is ready; `started(request)` hears of each claim."""
        wanted = wanted or WorkerOptions()
        if wanted.model is not None:
            self.ledger.models.get(wanted.model)

        def one(request: Request, halt: threading.Event) -> list[Result]:
            if started:
                started(request)
            return run_request(self.ledger, self.artifacts, execute, request, halt)

        return drain(self.ledger, worker_name(), wanted, one)


def worker_name() -> str:
    """This process's name in leases: host and process id, and its job where it is the driver of one."""
    from fsu_ray.cluster.jobs import claimant

    return claimant(f"{socket.gethostname()}:{os.getpid()}")


def read_weights(path: Path) -> bytes:
    """The bytes of a weights file; raises InvalidWeights where there is none."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise InvalidWeights(f"no weights at {path} ({error.strerror}): give a safetensors file") from None
