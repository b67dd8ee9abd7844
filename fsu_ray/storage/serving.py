"""Whether a generator that a request asks for by its id can serve it, and how: a pure rule, asked twice."""

from __future__ import annotations

from typing import Literal

from fsu_ray.errors import GeneratorUnfit
from fsu_ray.recipes import Recipe
from fsu_ray.records import Generator, Model, ModelVersion


def matches(generator: Generator, model: Model) -> bool:
    """Whether a generator draws what the model takes: its input shape and its classes."""
    own, taken = generator.spec, model.spec
    return (own.shape, own.classes) == (taken.shape, taken.classes)


def is_current(generator: Generator, root: ModelVersion, recipe: Recipe) -> bool:
    """Whether the D' of a generator of this line is what `recipe` would draw from it and `root` would label: then it
    is reused as it is. The paper's form draws D' anew from each version."""
    labelled = (generator.sealed or generator.root) == root.number
    return recipe.form != "paper" and labelled and generator.recipe_digest == recipe.generator_digest


def check_compatible(
    generator: Generator, model: Model, root: ModelVersion, recipe: Recipe
) -> Literal["reuse", "transfer"]:
    """How `generator` would serve a request of `model` whose D' is labelled by `root`.

    `reuse`: with its D' as it is. `transfer`: with its weights alone, from which D' is drawn and labelled anew; so one
    of another model does, or one whose D' is of an older root or of another recipe. Raises GeneratorUnfit where it is
    retired, draws something else than the model takes, or where it takes weights that a seal has destroyed.
    """
    others = "`fsu generator list` shows those in use"
    if generator.retired is not None:
        raise GeneratorUnfit(f"generator {generator.id} is retired ({generator.retired}); {others}")
    if not matches(generator, model):
        own, taken = (f"{s.classes} classes of {s.channels}x{s.height}x{s.width}" for s in (generator.spec, model.spec))
        raise GeneratorUnfit(
            f"generator {generator.id} of {generator.model!r} draws {own}, {model.name!r} takes {taken}; name one that "
            "draws the same"
        )
    if generator.model == model.name and is_current(generator, root, recipe):
        return "reuse"
    if generator.sealed is not None:
        raise GeneratorUnfit(
            f"generator {generator.id} of {generator.model!r} is sealed, its weights are destroyed, and its D' cannot "
            f"serve this request; {others}"
        )
    return "transfer"
