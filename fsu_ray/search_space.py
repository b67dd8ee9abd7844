"""What a search varies in a recipe: a range or some choices for each of its values.

`SPACE` holds the default by the kind of behaviour; `--range` on the command line changes a line of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fsu_ray.errors import InvalidConfig
from fsu_ray.recipes import Recipe
from fsu_ray.records import Kind


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, evenly or, if `log`, evenly by order of magnitude; `whole` numbers alone."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, rng: random.Random) -> float:
        """One value by chance."""
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
        ),  # below, D' has nothing of a subset (`recipes.SynthesizeRecipe`)
        "filter.policy": ("leave-one-out", "knee", "manual"),
        "filter.runner_up": Range(0.0, 0.5),
    },
}
UNSUITED = ("form", "seed", "steps", "starved_below", "holdout", "holdout_samples")
"""What no trial may vary: the score does not depend on it, or it would depend on what is varied itself."""

INVERSION = ("synthesize.", "invert.")
"""How the values begin that decide the generator and its D'; the others decide filter and relearning."""


def around(recipe: Recipe, kind: Kind) -> Space:
    """The space for changes of `recipe`: the weight of a BN loss that is a share of the statistics is another size."""
    relative = recipe.invert.form == "relative"
    return {**SPACE[kind], "invert.weights.bn": Range(10.0, 300.0, log=True)} if relative else SPACE[kind]


def draw(space: Space, rng: random.Random) -> dict[str, Any]:
    """A value by chance for each line of `space`."""
    return {key: rng.choice(line) if isinstance(line, tuple) else line.draw(rng) for key, line in sorted(space.items())}


def apply(base: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`base` with `values` such as `{"relearn.lr": 0.001}`; a threshold counts for the policy `manual` alone.

    Raises InvalidConfig naming the value that is wrong.
    """
    tree = base.model_dump(mode="json")
    for key, value in values.items():
        *folders, name = key.split(".")
        place = tree
        for folder in folders:
            place = place[folder]
        place[name] = value
    if tree["filter"]["policy"] != "manual":
        tree["filter"]["threshold"] = None
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidConfig(f"recipe: {'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from None


def narrowed(space: Space, lines: tuple[str, ...]) -> Space:
    """`space` under lines such as `relearn.lr=0.0001:0.01`, `filter.policy=knee,class` or `relearn.epochs=5`.

    Raises InvalidConfig for a value that a recipe does not have or cannot take, and for an empty range.
    """
    found = dict(space)
    for line in lines:
        key, _, text = line.partition("=")
        _known(key, line)
        if key.startswith("gate.") or key.rpartition(".")[2] in UNSUITED:
            raise InvalidConfig(f"--range {line}: a search cannot judge {key}, which is part of its measure; use --set")
        found[key] = _line(key, text, found.get(key))
        ends = found[key]
        for value in ends if isinstance(ends, tuple) else (ends.low, ends.high):
            whole = isinstance(ends, Range) and ends.whole
            manual = {"filter.policy": "manual"} if key == "filter.threshold" else {}
            threshold = {"filter.threshold": 0.5} if value == "manual" else {}
            apply(Recipe(), {**manual, **threshold, key: int(float(value)) if whole else value})
    return found


def _known(key: str, line: str) -> Any:
    """The default of a recipe's value; raises InvalidConfig where it has no such value."""
    place: Any = Recipe().model_dump(mode="json")
    for name in key.split("."):
        place = place.get(name, ...) if isinstance(place, dict) else ...
    if place is ... or isinstance(place, dict):
        raise InvalidConfig(
            f"--range {line}: a recipe has no value {key!r}; give KEY=LOW:HIGH or KEY=A,B with a key such as relearn.lr"
        )
    return place


def _line(key: str, text: str, before: Range | Choices | None) -> Range | Choices:
    low, colon, high = text.partition(":")
    if not colon:
        parts = [part for part in text.split(",") if part]
        if not parts:
            raise InvalidConfig(f"--range {key}: no value is given; give {key}=LOW:HIGH or {key}=A,B")
        if isinstance(before, Range) and len(parts) == 1:
            low, high = parts[0], parts[0]
        else:
            return tuple(parts)
    try:
        ends = float(low), float(high)
    except ValueError:
        raise InvalidConfig(f"--range {key}={text}: LOW and HIGH are numbers such as {key}=0.1:0.5") from None
    if not ends[0] <= ends[1] or not all(map(math.isfinite, ends)):
        raise InvalidConfig(f"--range {key}={text} is empty: LOW must not be above HIGH")
    log = isinstance(before, Range) and before.log and ends[0] > 0
    whole = before.whole if isinstance(before, Range) else isinstance(_known(key, f"{key}={text}"), int)
    return Range(*ends, log=log, whole=whole)
