"""The search for a better recipe for a model: Ray Tune over `method.objective`, without real data.

    reference (one task) ──> trials: invert to a rung ──> score ──> ASHA: stop, or go on ──> the best ──> SearchResult

A trial is a function in one worker. It trains a generator by its recipe. At every rung (a quarter, half and all of the
inversion steps) it draws a D', relearns on it, and reports the score of the recipe. The initial recipe is measured in
the same way to the end, so the result of a search never scores below it.

A search of the same name finds its trials again: after its driver has died it resumes.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError, RayTaskError
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler

from fsu_ray.cluster import workers
from fsu_ray.cluster.progress import ProgressListener, new_progress_actor
from fsu_ray.errors import FsuError, InvalidConfig, RunFailed, UserError
from fsu_ray.recipes import Recipe
from fsu_ray.records import ProgressCallback
from fsu_ray.search_space import Choices, Range, Space, apply, draw
from fsu_ray.work import BlobStore, WorkOrder

RUNGS = (0.25, 0.5, 1.0)
"""When a trial reports, as shares of the inversion steps."""

MARGIN = 0.002
"""By how much a score must exceed that of the initial recipe: a retention of .995 on 4,000 samples has a standard error
of .001."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    `space`: the values that trials vary. `trials`: how many recipes to try. `optuna`: draw them by Optuna instead of
    at random. `seed`: of the draws. Raises InvalidConfig for fewer than one trial, UserError where Optuna is missing.
    """

    space: Space
    trials: int = 16
    optuna: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InvalidConfig("a search needs at least one trial: give --trials 1 or more")
        if self.optuna:
            _optuna(self.seed)  # raises where Optuna is not installed


@dataclass(frozen=True)
class SearchResult:
    """The best recipe of a search and its score; the initial recipe unless another is better by MARGIN.

    `evidence` has the keys `name`; `trials`; `finished`: trials that were trained to the end; `steps`: inversion steps
    of all trials, the reference and the initial recipe; `seconds`: of the process that ended the search;
    `trial_seconds`: of all trials, whichever process started them; `initial` and `best`: the parts of their scores (see
    `method.objective.Parts`); `values`: what the best recipe changes.
    """

    recipe: Recipe
    score: float
    evidence: Mapping[str, Any]

    @property
    def better(self) -> bool:
        """Whether the recipe is better than the initial one."""
        return bool(self.score > self.evidence["initial"]["score"])


def search_name(order: WorkOrder, options: SearchOptions) -> str:
    """The name under which a search keeps its trials: a digest of everything that decides them."""
    space = json.dumps({key: repr(values) for key, values in sorted(options.space.items())})
    text = f"{order!r}{space}{options.optuna}{options.seed}{options.trials}"
    return f"search-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def search(
    order: WorkOrder,
    store: BlobStore,
    place: tuple[Any, str],
    options: SearchOptions,
    on_progress: ProgressCallback | None = None,
) -> SearchResult:
    """Search for a recipe for `order` on the Ray that this process is connected to; `order.recipe` is the initial one.

    `place`: the pyarrow filesystem (None: this machine's) and the folder of the trials. `on_progress(stage, done,
    total, metrics)` is called for the stages `reference` and `rungs`. Raises UserError for what
    cannot be searched, and RunFailed if no trial was completed.
    """
    started, name = time.monotonic(), search_name(order, options)
    use_gpu, share = workers.resources()
    actor = new_progress_actor()
    best, reports = 0.0, 0

    def report(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal best, reports
        if stage == "trial":
            best, reports = max(best, metrics["score"]), reports + 1
            stage, done, total, metrics = "rungs", reports, len(RUNGS) * options.trials, {**metrics, "best": best}
        if on_progress:
            on_progress(stage, done, total, metrics)

    never = threading.Event()  # Tune saves its state, so an interrupt may end the search at once
    with ProgressListener(actor, report, never):
        whole = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0)}
        reference = ray.remote(**whole)(_reference).remote(order, store, actor)
        ray.wait([reference])
        trial_share = {"cpu": 1, "gpu": 1} if use_gpu else {"cpu": 1}
        first = ray.remote(num_cpus=1, num_gpus=trial_share.get("gpu", 0))(_initial).remote(order, store, reference)
        try:
            ray.get(reference)
            trial = tune.with_parameters(_trial, order=order, store=store, reference=reference, actor=actor)
            tuner = _tuner(tune.with_resources(trial, trial_share), order, place, name, options)
            with redirect_stdout(io.StringIO()):  # a restored tuner prints tables at any verbosity
                results = workers.in_thread(tuner.fit, never, patience=0)
            initial = ray.get(first)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, FsuError) else RunFailed(str(error.cause))) from None
        except (RayError, TuneError, OSError, ValueError) as error:  # a lost worker, unavailable storage
            raise RunFailed(f"search {name} broke: {workers.cause(error)}; the same command resumes it") from None
    if len(results) != options.trials:  # Ray starts another search if it cannot read the saved one
        raise RunFailed(
            f"search {name} cannot be read back from {place[1]}: delete its folder there, or take another --seed"
        )
    return _best(order.recipe, initial, list(results), name, time.monotonic() - started)


def _best(base: Recipe, initial: dict[str, Any], results: list[Any], name: str, seconds: float) -> SearchResult:
    """The best of the initial recipe and of the recipes that were trained to the end."""
    rows = [result.metrics for result in results if result.metrics and "score" in result.metrics]
    if not rows:
        causes = [str(result.error).strip().splitlines()[-1] for result in results if result.error]
        raise RunFailed(f"no trial of {name} came to an end: {(causes or ['see its folder'])[0]}")
    whole = [row for row in rows if row["steps"] >= base.invert.steps]
    evidence: dict[str, Any] = {
        "name": name,
        "trials": len(results),
        "finished": len(whole),
        "steps": sum(row["steps"] for row in rows) + 2 * base.invert.steps,
        "seconds": round(seconds, 1),
        "trial_seconds": round(sum(row.get("time_total_s", 0.0) for row in rows), 1),
        "initial": initial,
    }
    top = max(whole, key=lambda row: float(row["score"]), default=None)
    if top is None or top["score"] <= initial["score"] + MARGIN:
        return SearchResult(base, initial["score"], {**evidence, "best": initial, "values": {}})
    values = _values(top["config"])
    best = {part: top[part] for part in initial}
    return SearchResult(apply(base, values), top["score"], {**evidence, "best": best, "values": values})


def _tuner(trainable: Any, order: WorkOrder, place: tuple[Any, str], name: str, options: SearchOptions) -> Any:
    """A new search, or the saved one of that name."""
    filesystem, folder = place
    path = f"{folder}/{name}"
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        resume = {"resume_unfinished": True, "restart_errored": True, "storage_filesystem": filesystem}
        return tune.Tuner.restore(path, trainable, **resume)
    steps = order.recipe.invert.steps
    grace = max(1, int(RUNGS[0] * steps))
    asha = ASHAScheduler(time_attr="steps", max_t=steps, grace_period=grace, reduction_factor=2)
    space, algorithm = _draws(options), None
    if options.optuna:
        space, algorithm = {key: _domain(values) for key, values in options.space.items()}, _optuna(options.seed)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=options.trials if options.optuna else 1,
            scheduler=asha,
            search_alg=algorithm,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    )


def _draws(options: SearchOptions) -> dict[str, Any]:
    """The values of all trials, drawn here so that a seed decides them."""
    rng = random.Random(options.seed)
    return {"values": tune.grid_search([draw(options.space, rng) for _ in range(options.trials)])}


def _optuna(seed: int) -> Any:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UserError("--optuna needs Optuna: pip install 'fsu_ray[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(metric="score", mode="max", seed=seed)


def _domain(values: Range | Choices) -> Any:
    """The same entry of a space in Tune's terms."""
    if isinstance(values, tuple):
        return tune.choice(list(values))
    if values.low == values.high:
        return tune.choice([int(values.low) if values.whole else values.low])
    if values.whole:
        return tune.randint(int(values.low), int(values.high) + 1)
    return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a trial, by keys such as `relearn.lr`; Optuna's configurations have no `values` above them."""
    return dict(config.get("values", config))


def _reference(order: WorkOrder, store: BlobStore, actor: Any) -> bytes:
    """The reference D', made in a worker."""
    from fsu_ray.method.objective import reference

    actor.tell.remote(("reference", 0, 1, {}))
    dataset = reference(order, store, _device(), order.recipe)
    actor.tell.remote(("reference", 1, 1, {"samples": len(dataset)}))
    return dataset.to_bytes()


def _initial(order: WorkOrder, store: BlobStore, reference: bytes) -> dict[str, Any]:
    """The parts of the initial recipe's score, measured in a worker."""
    objective, run = _ready(order, store, reference, order.recipe)
    return asdict(objective.score(order.recipe, _train(objective, run, order.recipe, order.recipe.invert.steps)))


def _ready(order: WorkOrder, store: BlobStore, reference: bytes, recipe: Recipe) -> tuple[Any, Any]:
    from fsu_ray.method import invert
    from fsu_ray.method.objective import Objective
    from fsu_ray.method.synthesize import Synthetic

    objective = Objective(order, store, _device(), Synthetic.from_bytes(reference))
    return objective, invert.begin(objective.teacher, recipe.invert)


def _train(objective: Any, run: Any, recipe: Recipe, until: int) -> Any:
    from fsu_ray.method import invert

    return invert.invert(objective.teacher, recipe.invert, run, until=until)


def _trial(config: dict[str, Any], order: WorkOrder, store: BlobStore, reference: bytes, actor: Any) -> None:
    """Train and score one recipe: a report and a checkpoint of the inversion at every rung."""
    import torch

    recipe = apply(order.recipe, _values(config))
    objective, run = _ready(order, store, reference, recipe)
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            run.restore(torch.load(Path(folder) / "state.pt", weights_only=True, map_location="cpu"))
    steps = recipe.invert.steps
    for until in sorted({max(1, int(share * steps)) for share in RUNGS}):
        if until <= run.step:
            continue
        generator = _train(objective, run, recipe, until)
        parts = asdict(objective.score(recipe, generator))
        actor.tell.remote(("trial", until, steps, {"score": parts["score"]}))
        with tempfile.TemporaryDirectory() as folder:
            torch.save(run.state(), Path(folder) / "state.pt")
            tune.report({**parts, "steps": until}, checkpoint=tune.Checkpoint.from_directory(folder))


def _device() -> Any:
    """The device of this task or trial. Sets its number of threads: a worker keeps those of its last task."""
    import torch

    from fsu_ray.method.precision import default_device

    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    return default_device()
