"""Filtration: the D_e-like samples of D', and what an erasure does to their labels (eq. 9 and 10, Algorithm 3).

As printed, eq. 9 sums a kernel and keeps samples below a threshold, which selects the dissimilar ones. Here every
metric is a distance, so D_e-like means near.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fsu_ray.errors import StorageError
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.hooks import observe
from fsu_ray.recipes import FilterRecipe
from fsu_ray.records import Behaviour

LADDER = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # kneed's sensitivity S: a higher one finds a later knee


@dataclass(frozen=True)
class Mask:
    """What one erasure does to D'.

    `is_forget` (N,) bool: the D_e-like samples. The classes `targets` lose their probability on these, or on all
    samples where `whole_class` (the class is erased as a whole). `policy` chose the samples; `threshold` is its t_f,
    None where no distance decided.
    """

    is_forget: Tensor
    targets: tuple[int, ...]
    whole_class: bool
    policy: str
    threshold: float | None

    def to_bytes(self) -> bytes:
        """As safetensors, with the scalars in the metadata."""
        about = {"targets": list(self.targets), "everywhere": self.whole_class}
        about |= {"policy": self.policy, "threshold": self.threshold}
        return save_tensors({"like": self.is_forget}, {"mask": json.dumps(about)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Mask:
        """Read what `to_bytes` wrote; raises StorageError for anything else."""
        try:
            is_forget = load_tensors(data)["like"]
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"]["mask"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise StorageError(f"the mask cannot be read ({error})") from None
        return cls(is_forget, tuple(about["targets"]), about["everywhere"], about["policy"], about["threshold"])


@torch.no_grad()
def extract_features(classifier: Classifier, pixels: Tensor, batch: int = 1000) -> Tensor:
    """f_e of uint8 pixels (N, C, H, W) -> (N, F) float32 on the CPU."""
    device = next(classifier.parameters()).device
    classifier.eval()
    parts = []
    for part in torch.split(pixels, batch):
        with observe(classifier, statistics=False) as seen:
            classifier(part.to(device).float() / 255)
        assert seen.features is not None
        parts.append(seen.features.float().cpu())
    return torch.cat(parts)


def bandwidth(examples: Tensor) -> float:
    """b of the RBF kernel: the median squared distance between different examples (M, F); 1 for a single one."""
    if len(examples) < 2:
        return 1.0
    median = torch.pdist(examples).square().median()
    return max(float(median), 1e-12)


def pairwise(features: Tensor, examples: Tensor, metric: str, b: float) -> Tensor:
    """Distance of every feature (N, F) to every example (M, F): (N, M). RBF and cosine lie in [0, 1] and [0, 2]."""
    if metric == "cosine":
        unit = torch.nn.functional.normalize
        return 1 - unit(features) @ unit(examples).T
    far = torch.cdist(features, examples, compute_mode="donot_use_mm_for_euclid_dist")  # no cancellation
    return far if metric == "l2" else 1 - torch.exp(-far.square() / (2 * b))


def distances(features: Tensor, examples: Tensor, metric: str = "rbf") -> Tensor:
    """Mean distance of each feature (N, F) to the examples of D_e (M, F): (N,). Eq. 9 with the sign put right.

    Cost O(N M) in chunks of 4,096 features.
    """
    b = bandwidth(examples)
    return torch.cat([pairwise(part, examples, metric, b).mean(1) for part in torch.split(features, 4096)])


def leave_one_out(examples: Tensor, metric: str = "rbf") -> Tensor:
    """Distance of each example (M, F) to the other ones: (M,). Needs two; a single one gives 0."""
    m = len(examples)
    if m < 2:
        return torch.zeros(m)
    far = pairwise(examples, examples, metric, bandwidth(examples))
    far.fill_diagonal_(0)
    return far.sum(1) / (m - 1)


def knee(ordered: Tensor, sensitivity: float = 1.0) -> float | None:
    """The distance at the knee of sorted distances (N,), by kneed; None where their curve has none."""
    from kneed import KneeLocator

    values = ordered.numpy()
    with warnings.catch_warnings():  # kneed warns where a curve has no knee; that is an answer here
        warnings.simplefilter("ignore")
        at = KneeLocator(range(len(values)), values, S=sensitivity, curve="concave", direction="increasing").knee
    return None if at is None else float(values[int(at)])


def knee_threshold(distances: Tensor, examples: Tensor, metric: str) -> float:
    """t_f at the knee of the sorted distances (N,) (appendix C.3), by kneed.

    The knee at S = 1 selects far too few samples, so S rises until the knee reaches the mean leave-one-out distance of
    the examples (M, F). Their largest leave-one-out distance bounds t_f from above.
    """
    ordered = distances.sort().values.double()
    among_examples = leave_one_out(examples, metric)
    low, high = float(among_examples.mean()), float(among_examples.max())
    for sensitivity in LADDER:
        threshold = knee(ordered, sensitivity)
        if threshold is not None and threshold >= low:
            return min(threshold, high)
    return low


def own_share(logits: Tensor, example_logits: Tensor, targets: tuple[int, ...]) -> Tensor:
    """(N,): the root's probability of each sample's most likely non-target class, 0 where fewer than a tenth of the
    examples have that class.

    logits (N, K) of D', example_logits (M, K) of the examples. A wrongly labelled sample keeps some probability of its
    right class; a real member of the target class does not.
    """

    def best_other_class(logits: Tensor) -> Tensor:
        is_target = torch.zeros(logits.shape[1], dtype=torch.bool)
        is_target[list(targets)] = True
        return logits.masked_fill(is_target, -torch.inf).argmax(1)

    usual = torch.bincount(best_other_class(example_logits), minlength=logits.shape[1]) / len(example_logits)
    other = best_other_class(logits)
    return logits.softmax(1).gather(1, other[:, None])[:, 0] * (usual[other] >= 0.1)


def least_share(shares: Tensor, recipe: FilterRecipe) -> float:
    """The least of `shares` (N,), by `own_share`, that a D_e-like sample of a subset needs.

    It is `recipe.runner_up`. Where fewer than `recipe.fewest` samples reach that, it is lowered until so many do, but
    not under a tenth of `runner_up`: generators differ in how sure the root is of their samples.
    """
    highest = shares.sort(descending=True).values[: recipe.fewest]
    enough = float(highest[-1]) if len(highest) else 1.0
    return min(recipe.runner_up, max(enough, recipe.runner_up / 10))


def policy_of(recipe: FilterRecipe, behaviour: Behaviour) -> str:
    """The policy for `behaviour`: that of the recipe; for `auto`, `class` for whole classes and `leave-one-out` for a
    subset."""
    if recipe.policy == "auto":
        return "class" if behaviour.kind == "class" else "leave-one-out"
    return recipe.policy


def select_class(behaviour: Behaviour, predicted: Tensor) -> Mask:
    """The mask by the policy `class`: every sample of D' that the root predicts (N,) to be of a target class."""
    return Mask(torch.isin(predicted, torch.tensor(behaviour.targets)), behaviour.targets, True, "class", None)


def select(
    recipe: FilterRecipe,
    behaviour: Behaviour,
    features: Tensor,
    predicted: Tensor,
    examples: Tensor,
    logits: tuple[Tensor, Tensor] | None = None,
) -> Mask:
    """The mask of `behaviour` over D'.

    features (N, F) and predicted (N,) of D'; examples (M, F): features of the target samples. A sample is D_e-like if
    the root predicts a target class and, unless the policy is `class`, its distance to the examples is at most t_f. For
    a subset, `logits` of D' (N, K) and of the examples (M, K) exclude real members of the target class: see
    `own_share`.
    """
    policy, by_class = policy_of(recipe, behaviour), select_class(behaviour, predicted)
    if policy == "class":
        return by_class
    far = distances(features, examples, recipe.metric)
    if recipe.threshold is not None:
        threshold = recipe.threshold
    elif policy == "knee":
        threshold = knee_threshold(far, examples, recipe.metric)
    else:
        threshold = float(leave_one_out(examples, recipe.metric).quantile(recipe.quantile))
    is_forget = by_class.is_forget & (far <= threshold)
    if behaviour.kind == "subset" and logits is not None and recipe.runner_up > 0:
        shares = own_share(*logits, behaviour.targets) * is_forget
        is_forget = shares >= least_share(shares, recipe)
    return Mask(is_forget, behaviour.targets, False, policy, threshold)


def allowed_classes(masks: Iterable[Mask], n: int, classes: int) -> Tensor:
    """(N, K) bool: the classes that all masks leave to each of the N samples of D'."""
    allowed = torch.ones((n, classes), dtype=torch.bool)
    for mask in masks:
        rows = torch.ones(n, dtype=torch.bool) if mask.whole_class else mask.is_forget
        allowed[rows.nonzero(), torch.tensor(mask.targets)] = False
    return allowed


def relabel(logits: Tensor, allowed: Tensor) -> Tensor:
    """r(y, y_e) of eq. 10: soft labels (N, K) without any probability of the classes that are not allowed.

    The logits (N, K) of these classes become -inf and the rest is normalised. Every row must keep a class.
    """
    return logits.masked_fill(~allowed, -torch.inf).softmax(1)
