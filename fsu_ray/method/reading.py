"""A generator from its weights alone: how wide it is, and how many dimensions its z has, is in the tensors' shapes."""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from fsu_ray.errors import InvalidWeights
from fsu_ray.models.networks import Generator, load_weights
from fsu_ray.records import ModelSpec


def read_generator(spec: ModelSpec, data: bytes, latent: int | None = None) -> Generator:
    """The generator with the weights `data` (safetensors of `networks.Generator.state_dict()`), in eval mode.

    Its first layer takes z and a place for each class, so that the classes of weights from outside are only known where
    `latent`, the dimensions of z, is. Raises InvalidWeights where the file is no whole safetensors file, holds other
    tensors, or those of a generator for another input shape or other classes than those of `spec`.
    """
    generator = Generator(spec, *_sizes(spec, data, latent))
    shape = f"{spec.channels}x{spec.height}x{spec.width}"
    load_weights(generator, data, f"a generator of {shape}", "what the model takes")
    return generator.eval()


def _sizes(spec: ModelSpec, data: bytes, latent: int | None) -> tuple[int, int]:
    """Width and latent of the generator in `data`, some where there is none: to load it will say what is wrong."""
    try:
        tensors = load_tensors(data)
        (_, inputs), (channels, doubled, _, _) = tensors["linear.weight"].shape, tensors["conv3.weight"].shape
    except (SafetensorError, ValueError, KeyError):
        return 1, 1
    found = inputs - spec.classes
    if found < 1 or latent not in (None, found):
        wanted = "" if latent is None else f" {latent} dimensions of z and"
        other = f"; if its z has {found}, give --latent {found}" if found > 0 else ""
        raise InvalidWeights(f"the generator takes {inputs} inputs, not{wanted} {spec.classes} classes{other}")
    if channels != spec.channels:
        raise InvalidWeights(f"the generator draws {channels} channels, the model takes {spec.channels}")
    return max(1, doubled // 2), found
