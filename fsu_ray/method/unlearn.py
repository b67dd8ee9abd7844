"""One erasure from a work order to an outcome: invert or reuse, synthesize, filter, relearn, evaluate.

The stages run in this order in any process; Ray workers and plain scripts call the same `unlearn`.
Bytes come from and go to a `BlobStore`, so a checkpoint holds digests (and, during the inversion,
the generator and its optimiser), and a resumed run repeats at most one stage.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fsu_ray.errors import StorageError
from fsu_ray.gate import refuse_generator
from fsu_ray.method import evaluate, invert, reporting
from fsu_ray.method.augment import seeded
from fsu_ray.method.filter import Mask, allowed_classes, extract_features, relabel, select
from fsu_ray.method.fit import predict
from fsu_ray.method.networks import Classifier, Generator
from fsu_ray.method.relearn import relearn
from fsu_ray.method.synthesize import Synthetic, starved_classes, synthesize
from fsu_ray.records import BlobStore, GeneratorUse, Outcome, PriorErasure, WorkOrder

Progress = Callable[[str, int, int, dict[str, float]], None]
FEWEST_TO_HOLD_OUT = 10  # with fewer target samples none is held out


@dataclass
class Saved:
    """What a checkpoint holds: the stages that are done, by their results, and a running inversion."""

    use: GeneratorUse | None = None
    generator: str | None = None
    dataset: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    mask: str | None = None
    weights: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_at: list[str] = field(default_factory=list)
    inversion: dict[str, Any] | None = None


Checkpoint = Callable[[Saved], None]


def save_samples(pixels: Tensor) -> bytes:
    """Target samples (M, C, H, W) uint8 as an artifact."""
    return save_tensors({"pixels": pixels.contiguous()})


def unlearn(
    order: WorkOrder,
    store: BlobStore,
    device: torch.device,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    saved: Saved | None = None,
    every: int = 100,
) -> Outcome:
    """Carry out `order` and return what came of it; nothing is judged here but the generator.

    `progress(stage, done, total, figures)` hears of every stage, `checkpoint` gets the state after
    each and every `every` steps of the inversion; a run that gets such a state as `saved` goes on
    from it. Raises StorageError where an artifact is missing.
    """
    run = _Run(order, store, device, progress, checkpoint, saved or Saved(), every)
    run.obtain_dataset()
    reason = run.starvation() or run.apply_mask() or run.relearn()
    if reason is None:
        run.evaluate()
    return run.outcome(reason)


class _Run:
    """The state of one run: the stages are its methods, in their order."""

    def __init__(
        self,
        order: WorkOrder,
        store: BlobStore,
        device: torch.device,
        progress: Progress | None,
        checkpoint: Checkpoint | None,
        saved: Saved,
        every: int,
    ) -> None:
        self.order, self.store, self.device = order, store, device
        self.progress, self.checkpoint, self.saved, self.every = progress, checkpoint, saved, every
        self.recipe = order.recipe
        paper = self.recipe.form == "paper"
        self.current = self._classifier(order.current_weights)
        self.labeller = self.current if paper else self._classifier(order.root_weights)
        self.samples = load_tensors(store.get(order.samples))["pixels"]
        self.priors = () if paper else order.priors
        self.gone = sorted({t for p in order.priors if p.behaviour.kind == "class" for t in p.behaviour.targets})
        self.held_out = self._hold_out()
        self.report: dict[str, Any] = {}
        self.probes: str | None = None

    def _classifier(self, digest: str) -> Classifier:
        found = Classifier.from_bytes(self.order.spec, self.store.get(digest))
        return found.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def _hold_out(self) -> Tensor:
        """(M,) bool: the target samples that are only measured on."""
        m = len(self.samples)
        chosen = torch.zeros(m, dtype=torch.bool)
        if m >= FEWEST_TO_HOLD_OUT:
            number = max(1, round(self.recipe.gate.holdout_samples * m))
            chosen[torch.randperm(m, generator=seeded(self.recipe.relearn.seed, m))[:number]] = True
        return chosen

    def _tell(self, stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        if self.progress:
            self.progress(stage, done, total, figures or {})

    def _finish(self, stage: str, started: float) -> None:
        """A stage is done: note its time and save the state."""
        self.saved.seconds[stage] = self.saved.seconds.get(stage, 0.0) + time.monotonic() - started
        self.saved.inversion = None
        if self.checkpoint:
            self.checkpoint(self.saved)

    def obtain_dataset(self) -> None:
        """Reuse the generator and D' that the registry offers if the gate lets them, else train and draw anew."""
        if self.saved.dataset is not None:
            self.dataset = self._load_dataset(self.saved.dataset)
        elif self.saved.generator is None and self.saved.inversion is None and self._reuse():
            return
        else:
            self._train_generator()
            self._draw()

    def _load_dataset(self, digest: str) -> Synthetic:
        found = Synthetic.from_bytes(self.store.get(digest))
        if tuple(found.pixels.shape[1:]) != self.order.spec.shape:
            raise StorageError(f"data set {digest[:12]} does not have the shape of the model")
        return found

    def _reuse(self) -> bool:
        offer = self.order.reuse
        if offer is None:
            return False
        started = time.monotonic()
        self._tell("gate", 0, 1)
        self.dataset = self._load_dataset(offer.dataset)
        figures = self._judged(dict(offer.figures))
        refused = refuse_generator(figures, self.recipe.gate)
        self.saved.refused = list(refused)
        self._tell("gate", 1, 1, {"agreement": figures["agreement"], "coverage": figures["coverage"]})
        if refused:
            return False
        self.saved.use, self.saved.generator, self.saved.dataset = "reused", offer.weights, offer.dataset
        self.saved.figures = figures
        self._finish("gate", started)
        return True

    def _judged(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """The figures of `self.dataset` for the current version; `drawn`: acceptance and count by class."""
        drawn = {
            "acceptance": drawn.get("acceptance_by_class", drawn["acceptance"]),
            "count": drawn.get("count_by_class") or drawn["count"],
        }
        masks = [self._prior_mask(prior) for prior in self.priors]
        n, k = len(self.dataset), self.order.spec.classes
        untouched = ~torch.stack([m.like for m in masks]).any(0) if masks else torch.ones(n, dtype=torch.bool)
        starved = [c for c in starved_classes(drawn["count"], self.recipe.synthesize) if c not in self.gone]
        return evaluate.generator_figures(
            self.current, self.dataset, drawn, allowed_classes(masks, n, k), untouched, self.gone, starved
        )

    def _train_generator(self) -> None:
        """Inversion of the labelling version, from the weights of an older generator where there is one."""
        if self.saved.generator is not None:
            return
        started = time.monotonic()
        warm = self.order.warm or self.order.reuse
        weights = load_tensors(self.store.get(warm.weights)) if warm and self.store.has(warm.weights) else None
        run = invert.begin(self.labeller, self.recipe.invert, weights)
        if self.saved.inversion is not None:
            run.restore(self.saved.inversion)
            self.saved.resumed_at.append(f"invert {run.step}")
        before = self.saved.seconds.get("invert", 0.0)

        def keep(run: invert.Inversion) -> None:
            self.saved.inversion = run.state()
            self.saved.seconds["invert"] = before + time.monotonic() - started
            assert self.checkpoint is not None
            self.checkpoint(self.saved)

        generator = invert.invert(
            self.labeller,
            self.recipe.invert,
            run,
            lambda step, steps, losses: self._tell("invert", step, steps, losses),
            keep if self.checkpoint else None,
            self.every,
        )
        self.saved.use = "warm_started" if weights else "trained"
        self.saved.generator = self.store.put(
            save_tensors({name: t.detach().cpu().contiguous() for name, t in generator.state_dict().items()})
        )
        self.saved.seconds["invert"] = before
        self._finish("invert", started)

    def _draw(self) -> None:
        started = time.monotonic()
        assert self.saved.generator is not None
        recipe = self.recipe.invert
        generator = Generator(self.order.spec, recipe.width, recipe.latent)
        generator.load_state_dict(load_tensors(self.store.get(self.saved.generator)))
        generator = generator.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dataset, drawn = synthesize(
            self.labeller,
            generator,
            self.recipe.synthesize,
            lambda done, total, figures: self._tell("synthesize", done, total, figures),
        )
        self.saved.dataset = self.store.put(self.dataset.to_bytes())
        self.saved.figures = self._judged(drawn)
        self._finish("synthesize", started)

    def starvation(self) -> str | None:
        """`starved_class` with the classes that D' cannot stand in for, if there are any."""
        starved = self.saved.figures["starved"]
        if not starved:
            return None
        return (
            f"starved_class: D' holds too few samples of {starved}; "
            "try more invert.steps, a higher synthesize.entropy_threshold, or other loss weights"
        )

    def _prior_mask(self, prior: PriorErasure) -> Mask:
        """The mask of an earlier erasure over this D': the recorded one where it was made for it, else rebuilt.

        It is rebuilt from the target samples, or from the probes once those have been purged.
        """
        if prior.dataset == (self.saved.dataset or (self.order.reuse and self.order.reuse.dataset)):
            return Mask.from_bytes(self.store.get(prior.mask))
        kept = prior.samples if self.store.has(prior.samples) else prior.probes
        examples = load_tensors(self.store.get(kept))["pixels"]
        return self._select(prior.filter, prior.behaviour, examples)

    def _select(self, recipe: Any, behaviour: Any, examples: Tensor) -> Mask:
        features = extract_features(self.labeller, self.dataset.pixels)
        logits = (self.dataset.logits, predict(self.labeller, examples))
        known = extract_features(self.labeller, examples)
        return select(recipe, behaviour, features, self.dataset.predicted, known, logits)

    def apply_mask(self) -> str | None:
        """This behaviour's mask over D', or `nothing_found` when no sample resembles the examples."""
        started = time.monotonic()
        self._tell("filter", 0, 1)
        if self.saved.mask is not None:
            self.mask = Mask.from_bytes(self.store.get(self.saved.mask))
        else:
            self.mask = self._select(self.recipe.filter, self.order.behaviour, self.samples[~self.held_out])
            self.saved.mask = self.store.put(self.mask.to_bytes())
            self._finish("filter", started)
        found = int(self.mask.like.sum())
        self._tell("filter", 1, 1, {"found": found})
        self.probes = self.store.put(save_samples(self.dataset.pixels[self.mask.like]))
        if found:
            return None
        return (
            "nothing_found: no sample of D' resembles the target samples; give more samples, "
            "or set filter.policy to class (whole classes) or manual (with filter.threshold)"
        )

    def _masks(self) -> list[Mask]:
        return [*(self._prior_mask(prior) for prior in self.priors), self.mask]

    def relearn(self) -> str | None:
        """From the current version, on D' under all masks and on the given samples, relabelled.

        `retention_lost` where it diverged: such weights are not worth a measure.
        """
        if self.saved.weights is not None:
            return None
        started = time.monotonic()
        masks = self._masks()
        allowed = allowed_classes(masks, len(self.dataset), self.order.spec.classes)
        usable = ~self.dataset.holdout & allowed.any(1)
        few = torch.stack([mask.like & (not mask.everywhere) for mask in masks]).any(0) & usable
        train = torch.cat([usable.nonzero(), *[few.nonzero()] * self.recipe.relearn.mask_repeats]).flatten()
        child = copy.deepcopy(self.current)
        relearn(
            child,
            self.dataset.pixels[train],
            relabel(self.dataset.logits[train], allowed[train]),
            *self._given(),
            self.recipe.relearn,
            lambda epoch, epochs, losses: self._tell("relearn", epoch, epochs, losses),
        )
        if not all(bool(t.isfinite().all()) for t in child.parameters()):
            return "retention_lost: the relearning diverged; try a lower relearn.lr"
        self.saved.weights = self.store.put(child.to_bytes())
        self._finish("relearn", started)
        return None

    def _given(self) -> tuple[Tensor, Tensor]:
        """The target samples that may be trained on, (M, C, H, W), and their new labels (M, K).

        Those of earlier subsets are among them while they have not been purged: a subset holds few
        probes, and its samples keep it from coming back.
        """
        sets = [(self.samples[~self.held_out], self.order.behaviour)]
        for prior in self.priors:
            if prior.behaviour.kind == "subset" and self.store.has(prior.samples):
                sets.append((load_tensors(self.store.get(prior.samples))["pixels"], prior.behaviour))
        pixels, labels = [], []
        for samples, behaviour in sets:
            allowed = torch.ones((len(samples), self.order.spec.classes), dtype=torch.bool)
            allowed[:, [*behaviour.targets, *self.gone]] = False
            if bool(allowed.any()):
                pixels.append(samples)
                labels.append(relabel(predict(self.labeller, samples), allowed))
        return torch.cat(pixels), torch.cat(labels)

    def evaluate(self) -> None:
        """Fill `report`; its keys are described in `method.reporting` and `method.evaluate`."""
        started = time.monotonic()
        self._tell("evaluate", 0, 1)
        assert self.saved.weights is not None
        child = self._classifier(self.saved.weights)
        before, after = predict(self.current, self.dataset.pixels), predict(child, self.dataset.pixels)
        masks = self._masks()
        touched = torch.stack([m.like for m in masks]).any(0)
        kept = self.dataset.holdout & ~touched
        self.report = {
            "forgetting": reporting.forgetting(
                self.order, self.current, child, self.samples, self.held_out, self.dataset, self.mask, before, after
            ),
            "retention": evaluate.retention(before[kept], after[kept], self.order.spec.classes),
            "earlier": [reporting.earlier(self.store, child, prior) for prior in self.order.priors],
            "test": reporting.on_test_set(self.order, self.current, child, self.gone),
        }
        self._finish("evaluate", started)
        self._tell("evaluate", 1, 1, {"agreement": self.report["retention"]["agreement"]})

    def outcome(self, reason: str | None) -> Outcome:
        """What came of it, by digests and figures alone."""
        saved = asdict(self.saved)
        return Outcome(
            reason=reason,
            generator_use=saved["use"],
            generator_weights=saved["generator"],
            dataset=saved["dataset"],
            figures=saved["figures"],
            refused=tuple(saved["refused"]),
            weights=saved["weights"],
            mask=saved["mask"],
            probes=self.probes,
            report=self.report,
            seconds={stage: round(t, 2) for stage, t in saved["seconds"].items()},
        )
