"""The space of a search: draws, recipes made of them, ranges from the command line."""

from __future__ import annotations

import random

import pytest

from fsu_ray.errors import InvalidConfig
from fsu_ray.recipes import Recipe
from fsu_ray.search_space import SPACE, Range, apply, around, draw, narrowed


@pytest.mark.parametrize("kind", ["class", "subset"])
def test_every_draw_makes_a_recipe_within_the_space(kind):
    """300 draws: all make recipes, every value is within its line, every choice comes up, a seed gives the same."""
    rng, again = random.Random(1), random.Random(1)
    seen = set()
    for _ in range(300):
        values = draw(SPACE[kind], rng)
        assert values == draw(SPACE[kind], again)
        recipe = apply(Recipe(), values)
        for key, line in SPACE[kind].items():
            if isinstance(line, Range):
                assert line.low <= values[key] <= line.high
        seen.add(recipe.filter.policy)
        assert (recipe.filter.threshold is not None) == (recipe.filter.policy == "manual")
        assert recipe.invert.weights.bn == values["invert.weights.bn"]
        assert isinstance(recipe.relearn.epochs, int)
    assert seen == set(SPACE[kind]["filter.policy"])


def test_a_logarithmic_range_is_even_by_order_of_magnitude():
    """As many draws below the geometric mean as above it; a single value is that value."""
    rng, line = random.Random(0), Range(0.01, 100.0, log=True)
    below = sum(line.draw(rng) < 1 for _ in range(2000))
    assert 900 < below < 1100
    assert {Range(3, 3, whole=True).draw(rng) for _ in range(5)} == {3}


def test_no_values_leave_the_recipe_as_it_is():
    """The search's first recipe is the one that it is given."""
    assert apply(Recipe(), {}) == Recipe()


def test_ranges_of_the_command_line_take_the_place_of_lines():
    """They keep what the line was like; a value that the space had not gets a line, a single number a fixed value."""
    lines = (
        "relearn.lr=0.001:0.002",
        "filter.policy=knee,class",
        "relearn.epochs=4",
        "invert.views=1:3",
        "invert.lr=.1:.2",
    )
    space = narrowed(SPACE["class"], lines)
    assert space["relearn.lr"] == Range(0.001, 0.002, log=True)
    assert space["filter.policy"] == ("knee", "class")
    assert space["relearn.epochs"] == Range(4, 4, whole=True)
    assert space["invert.views"] == Range(1, 3, whole=True)
    assert space["invert.lr"] == Range(0.1, 0.2)
    assert space["filter.quantile"] == SPACE["class"]["filter.quantile"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("relearn.lr=0.2:0.1", "is empty: LOW must not be above HIGH"),
        ("relearn.lr=", "no value is given"),
        ("relearn.lr=a:b", "LOW and HIGH are numbers"),
        ("relearn.lr=nan:1", "is empty"),
        ("relearn.rate=1:2", "a recipe has no value 'relearn.rate'"),
        ("relearn=1:2", "a recipe has no value 'relearn'"),
        ("relearn.lr=-1:1", "relearn.lr: Input should be greater than 0"),
        ("filter.policy=nice", "filter.policy: Input should be"),
    ],
)
def test_a_range_that_cannot_be_searched_is_named(line, said):
    """One line, before anything runs."""
    with pytest.raises(InvalidConfig, match=said):
        narrowed(SPACE["class"], (line,))


def test_the_space_lies_around_the_recipe_that_is_changed():
    """The weight of a relative BN loss is of another size; what else there is stays."""
    relative = Recipe.model_validate({"invert": {"form": "relative"}})
    assert around(Recipe(), "class") == SPACE["class"]
    changed = {key for key, line in around(relative, "subset").items() if line != SPACE["subset"][key]}
    assert changed == {"invert.weights.bn"}
    assert around(relative, "subset")["invert.weights.bn"] == Range(10.0, 300.0, log=True)
