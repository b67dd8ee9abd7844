"""What a search varies in a recipe: a range or a list of choices for each value.

`SPACE` holds the default for each kind of behaviour; `--range` on the command line changes one entry.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fsu_ray.config import change_recipe, nested
from fsu_ray.errors import InvalidConfig
from fsu_ray.recipes import Recipe
from fsu_ray.records import Kind


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`: uniform, log-uniform if `log`, integers if `whole`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, rng: random.Random) -> float:
        """A random value."""
        if self.whole:
            return rng.randint(int(self.low), int(self.high))
        if self.log:
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return rng.uniform(self.low, self.high)


Choices = tuple[str, ...]
Space = Mapping[str, Range | Choices]

_SHARED: dict[str, Range | Choices] = {
    "synthesize.entropy_threshold": Range(0.2, 1.6),
    "invert.weights.bn": Range(1.0, 30.0, log=True),
    "invert.weights.entropy": Range(0.1, 10.0, log=True),
    "invert.weights.augmentation": Range(0.1, 10.0, log=True),
    "invert.weights.diversity": Range(0.1, 10.0, log=True),
    "invert.weights.tv": Range(0.01, 3.0, log=True),
    "filter.quantile": Range(0.7, 1.0),
    "filter.threshold": Range(0.1, 0.9),
    "relearn.lr": Range(2e-4, 1e-2, log=True),
    "relearn.epochs": Range(2, 12, whole=True),
}
SPACE: dict[Kind, Space] = {
    "class": {**_SHARED, "filter.policy": ("class", "leave-one-out", "knee", "manual")},
    "subset": {
        **_SHARED,
        "synthesize.entropy_threshold": Range(
            0.8, 1.8
        ),  # below, D' has no samples of a subset (`recipes.SynthesizeRecipe`)
        "filter.policy": ("leave-one-out", "knee", "manual"),
        "filter.runner_up": Range(0.0, 0.5),
    },
}
UNSUITED = ("form", "seed", "steps", "starved_below", "holdout", "holdout_samples")
"""Values that no trial may vary: the score does not depend on them, or they define the score."""

INVERSION = ("synthesize.", "invert.")
"""Prefixes of the values that decide the generator and its D'; the others decide filter and relearning."""


def around(recipe: Recipe, kind: Kind) -> Space:
    """The space for changes of `recipe`. A relative BN loss (eq. 6 per layer) needs a weight of another size."""
    relative = recipe.invert.form == "relative"
    return {**SPACE[kind], "invert.weights.bn": Range(10.0, 300.0, log=True)} if relative else SPACE[kind]


def draw(space: Space, rng: random.Random) -> dict[str, Any]:
    """A random value for each entry of `space`, drawn in the order of the keys."""
    return {
        key: rng.choice(values) if isinstance(values, tuple) else values.draw(rng)
        for key, values in sorted(space.items())
    }


def apply(base: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`base` with `values` such as `{"relearn.lr": 0.001}`; a threshold is dropped unless the policy is `manual`.

    Raises InvalidConfig that names the wrong value.
    """
    if values.get("filter.policy", base.filter.policy) != "manual":
        values = {**values, "filter.threshold": None}
    return change_recipe(base, (nested(key, value) for key, value in values.items()))


def narrowed(space: Space, lines: tuple[str, ...]) -> Space:
    """`space` changed by lines such as `relearn.lr=0.0001:0.01`, `filter.policy=knee,class` or `relearn.epochs=5`.

    Raises InvalidConfig for a value that a recipe does not have or cannot take, and for an empty range.
    """
    changed = dict(space)
    for line in lines:
        key, _, text = line.partition("=")
        _default_value(key, line)
        if key.startswith("gate.") or key.rpartition(".")[2] in UNSUITED:
            raise InvalidConfig(f"--range {line}: a search cannot judge {key}, which is part of its measure; use --set")
        entry = _parse(key, text, changed.get(key))
        changed[key] = entry
        for value in entry if isinstance(entry, tuple) else (entry.low, entry.high):
            whole = isinstance(entry, Range) and entry.whole
            manual = {"filter.policy": "manual"} if key == "filter.threshold" else {}
            threshold = {"filter.threshold": 0.5} if value == "manual" else {}
            apply(Recipe(), {**manual, **threshold, key: int(float(value)) if whole else value})
    return changed


def _default_value(key: str, line: str) -> Any:
    """The default of a recipe's value; raises InvalidConfig if a recipe has no such value."""
    value: Any = Recipe().model_dump(mode="json")
    for name in key.split("."):
        value = value.get(name, ...) if isinstance(value, dict) else ...
    if value is ... or isinstance(value, dict):
        raise InvalidConfig(
            f"--range {line}: a recipe has no value {key!r}; give KEY=LOW:HIGH or KEY=A,B with a key such as relearn.lr"
        )
    return value


def _parse(key: str, text: str, before: Range | Choices | None) -> Range | Choices:
    """The entry that `text` stands for; a range keeps the scale (`log`, `whole`) of the entry `before`."""
    low, colon, high = text.partition(":")
    if not colon:
        choices = [choice for choice in text.split(",") if choice]
        if not choices:
            raise InvalidConfig(f"--range {key}: no value is given; give {key}=LOW:HIGH or {key}=A,B")
        if isinstance(before, Range) and len(choices) == 1:
            low, high = choices[0], choices[0]
        else:
            return tuple(choices)
    try:
        ends = float(low), float(high)
    except ValueError:
        raise InvalidConfig(f"--range {key}={text}: LOW and HIGH are numbers such as {key}=0.1:0.5") from None
    if not ends[0] <= ends[1] or not all(map(math.isfinite, ends)):
        raise InvalidConfig(f"--range {key}={text} is empty: LOW must not be above HIGH")
    log = isinstance(before, Range) and before.log and ends[0] > 0
    whole = before.whole if isinstance(before, Range) else isinstance(_default_value(key, f"{key}={text}"), int)
    return Range(*ends, log=log, whole=whole)
