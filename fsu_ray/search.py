"""The search for a model line's recipe: Ray Tune over `method.objective`, without any real data.

    reference (one task) ──> trials: invert to a rung ──> score ──> ASHA: stop, or go on ──> the best ──> Found

A trial is a plain function in one worker: it trains a generator by its recipe, and at every rung (a quarter, half and
all of the inversion steps) draws a D', relearns on it, and reports what the recipe is worth. The recipe that the search
begins with is measured beside them, to the end, so that what is found is no worse by the same measure.

The search of a name finds its trials again: one whose driver has died goes on where it was.
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
from fsu_ray.search_space import Choices, Range, Space, apply, draw
from fsu_ray.work import BlobStore, WorkOrder

RUNGS = (0.25, 0.5, 1.0)
"""When a trial reports, as shares of its inversion steps."""

MARGIN = 0.002
"""By how much a recipe's score has to be above that of the first: a retention of .995 on 4,000 samples has a standard
error of .001. A recipe that was better by .0002 was refused by the gate when a request used it."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search: that many `trials` over `space`, by chance or by Optuna, `seed` for the draws."""

    space: Space
    trials: int = 16
    optuna: bool = False
    seed: int = 0


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    `evidence`: `name`, `trials`, `finished` (those that went to the end), `steps` (of inversion, of all trials, the
    reference and the first recipe), `seconds` (of the process that ended it), `trial_seconds` (of all trials, whichever
    process began them), `initial` and `best` (their parts, see `method.objective.Parts`), `values`.
    """

    recipe: Recipe
    score: float
    evidence: Mapping[str, Any]

    @property
    def better(self) -> bool:
        """Whether it is better than the recipe that the search began with."""
        return bool(self.score > self.evidence["initial"]["score"])


def search_name(order: WorkOrder, wanted: SearchOptions) -> str:
    """The name under which a search keeps its trials: it stands for all that decides them."""
    told = json.dumps({key: repr(line) for key, line in sorted(wanted.space.items())})
    all_of_it = f"{order!r}{told}{wanted.optuna}{wanted.seed}{wanted.trials}"
    return f"search-{hashlib.sha256(all_of_it.encode()).hexdigest()[:16]}"


def search(
    order: WorkOrder, store: BlobStore, place: tuple[Any, str], wanted: SearchOptions, on_progress: Any = None
) -> SearchResult:
    """Search for a recipe for `order` on the Ray that this process is connected to, `order.recipe` being the first.

    `place`: filesystem (None: this machine's) and folder of the trials. `tell(stage, done, total, figures)` hears of
    the reference and of trials. Raises UserError for a space or an order that cannot be searched, RunFailed where no
    trial came to an end.
    """
    if wanted.trials < 1:
        raise InvalidConfig("a search needs at least one trial: give --trials 1 or more")
    started, name = time.monotonic(), search_name(order, wanted)
    use_gpu, each = workers.resources()
    if wanted.optuna:
        _optuna(wanted)  # whether it is there
    line = new_progress_actor()
    alone = {"num_cpus": each["CPU"], "num_gpus": each.get("GPU", 0)}
    best, heard = 0.0, 0

    def hear(stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        nonlocal best, heard
        if stage == "trial":
            best, heard = max(best, metrics["score"]), heard + 1
            stage, done, total, metrics = "rungs", heard, len(RUNGS) * wanted.trials, {**metrics, "best": best}
        if on_progress:
            on_progress(stage, done, total, metrics)

    never = threading.Event()  # Tune keeps what there is: nobody needs to stop before an interrupt ends it all
    with ProgressListener(line, hear, never):
        reference = ray.remote(**alone)(_reference).remote(order, store, line)
        ray.wait([reference])
        share = {"cpu": 1, "gpu": 1} if use_gpu else {"cpu": 1}
        first = ray.remote(num_cpus=1, num_gpus=share.get("gpu", 0))(_initial).remote(order, store, reference)
        try:
            ray.get(reference)
            trial = tune.with_parameters(_trial, order=order, store=store, reference=reference, line=line)
            tuner = _tuner(tune.with_resources(trial, share), order, place, name, wanted)
            with redirect_stdout(io.StringIO()):  # a restored tuner prints tables, whatever its verbosity
                results = workers.in_thread(tuner.fit, never, patience=0)
            initial = ray.get(first)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, FsuError) else RunFailed(str(error.cause))) from None
        except (RayError, TuneError, OSError, ValueError) as error:  # a worker that is gone, a storage that is away
            raise RunFailed(f"search {name} broke: {workers.cause(error)}; the same again goes on") from None
    if len(results) != wanted.trials:  # Ray begins something else where it cannot read what there is
        raise RunFailed(
            f"search {name} cannot be read back from {place[1]}: delete its folder there, or take another --seed"
        )
    return _best(order.recipe, initial, list(results), name, time.monotonic() - started)


def _best(base: Recipe, initial: dict[str, Any], results: list[Any], name: str, seconds: float) -> SearchResult:
    """The best of the recipes that were trained to the end, and of the one that the search began with."""
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


def _tuner(trainable: Any, order: WorkOrder, place: tuple[Any, str], name: str, wanted: SearchOptions) -> Any:
    """A new search, or the one of that name as it was left."""
    filesystem, folder = place
    path = f"{folder}/{name}"
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        known = {"resume_unfinished": True, "restart_errored": True, "storage_filesystem": filesystem}
        return tune.Tuner.restore(path, trainable, **known)
    steps = order.recipe.invert.steps
    grace = max(1, int(RUNGS[0] * steps))
    asha = ASHAScheduler(time_attr="steps", max_t=steps, grace_period=grace, reduction_factor=2)
    space, algorithm = _draws(wanted), None
    if wanted.optuna:
        space, algorithm = {key: _domain(line) for key, line in wanted.space.items()}, _optuna(wanted)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=wanted.trials if wanted.optuna else 1,
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


def _draws(wanted: SearchOptions) -> dict[str, Any]:
    """All of the draws at once: the same for a seed, whoever runs them."""
    rng = random.Random(wanted.seed)
    return {"values": tune.grid_search([draw(wanted.space, rng) for _ in range(wanted.trials)])}


def _optuna(wanted: SearchOptions) -> Any:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UserError("a search by Optuna needs it: pip install 'fsu_ray[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(metric="score", mode="max", seed=wanted.seed)


def _domain(line: Range | Choices) -> Any:
    if isinstance(line, tuple):
        return tune.choice(list(line))
    if line.low == line.high:
        return tune.choice([int(line.low) if line.whole else line.low])
    if line.whole:
        return tune.randint(int(line.low), int(line.high) + 1)
    return tune.loguniform(line.low, line.high) if line.log else tune.uniform(line.low, line.high)


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial was given to try."""
    return dict(config.get("values", config))


def _reference(order: WorkOrder, store: BlobStore, line: Any) -> bytes:
    """The reference D', in a worker."""
    from fsu_ray.method.objective import reference

    line.tell.remote(("reference", 0, 1, {}))
    made = reference(order, store, _device(), order.recipe)
    line.tell.remote(("reference", 1, 1, {"samples": len(made)}))
    return made.to_bytes()


def _initial(order: WorkOrder, store: BlobStore, reference: bytes) -> dict[str, Any]:
    """The parts of the recipe that the search begins with, in a worker."""
    objective, run = _ready(order, store, reference, order.recipe)
    return asdict(objective.score(order.recipe, _train(objective, run, order.recipe, order.recipe.invert.steps)))


def _ready(order: WorkOrder, store: BlobStore, reference: bytes, recipe: Recipe) -> tuple[Any, Any]:
    from fsu_ray.method import invert
    from fsu_ray.method.objective import Objective
    from fsu_ray.method.synthesize import Synthetic

    objective = Objective(order, store, _device(), Synthetic.from_bytes(reference))
    return objective, invert.begin(objective.teacher, recipe.invert)


def _train(objective: Any, run: Any, recipe: Recipe, until: int, progress: Any = None) -> Any:
    from fsu_ray.method import invert

    return invert.invert(objective.teacher, recipe.invert, run, progress, until=until)


def _trial(config: dict[str, Any], order: WorkOrder, store: BlobStore, reference: bytes, line: Any) -> None:
    """One recipe: a report at every rung, with a checkpoint of the inversion."""
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
        line.tell.remote(("trial", until, steps, {"score": parts["score"]}))
        with tempfile.TemporaryDirectory() as folder:
            torch.save(run.state(), Path(folder) / "state.pt")
            tune.report({**parts, "steps": until}, checkpoint=tune.Checkpoint.from_directory(folder))


def _device() -> Any:
    """Where this task or trial works, with its threads: a worker still has those of what it did before."""
    import torch

    from fsu_ray.method.precision import default_device

    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    return default_device()
