"""The classifier, and weights in and out.

A classifier is built from a `ModelSpec` alone; its weights come from safetensors. It takes pixels in [0, 1] and
normalises them itself, so augmentation always sees un-normalised pixels.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fsu_ray.errors import InvalidWeights
from fsu_ray.models.architectures import build_network
from fsu_ray.records import ModelSpec


class Classifier(nn.Module):
    """A network behind its normalisation: pixels in [0, 1], (N, C, H, W) -> logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.network = build_network(spec)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.network((pixels - self.mean) / self.std)
        return out

    def to_bytes(self) -> bytes:
        """The network's weights as safetensors; the same weights give the same bytes."""
        return save_weights(self.network)

    @classmethod
    def from_bytes(cls, spec: ModelSpec, data: bytes) -> Classifier:
        """The classifier of `spec` with the weights in `data` (safetensors), in eval mode.

        Raises InvalidWeights where the file is no safetensors, is cut short, or does not fit.
        """
        classifier = cls(spec)
        load_weights(classifier.network, data, spec.arch)
        return classifier.eval()


def save_weights(network: nn.Module) -> bytes:
    """The state of `network` as safetensors; the same weights give the same bytes."""
    return save_tensors({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()})


def load_weights(network: nn.Module, data: bytes, name: str, check: str = "--arch, --input and --classes") -> None:
    """Load safetensors `data` into `network`; nothing is ever unpickled.

    Raises InvalidWeights where `data` is no whole safetensors file or does not fit. The message calls the network
    `name` and advises to check `check`.
    """
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        if data[:2] == b"PK" or data[:1] == b"\x80":
            raise InvalidWeights(
                "the weights are a pickle (torch.save), which could run code when read: save them with "
                "safetensors.torch.save_file(model.state_dict(), 'w.safetensors')"
            ) from None
        raise InvalidWeights(f"the weights are not a whole safetensors file ({error}); copy or save it again") from None
    expected = network.state_dict()
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        what = f"lack {missing[0]!r}" if missing else f"hold {surplus[0]!r} too"
        raise InvalidWeights(
            f"the weights do not fit {name}: they {what} ({len(missing)} missing, {len(surplus)} unknown tensors)"
        )
    for key, tensor in expected.items():
        if tensors[key].shape != tensor.shape:
            raise InvalidWeights(
                f"the weights do not fit {name}: {key!r} is {tuple(tensors[key].shape)}, "
                f"{tuple(tensor.shape)} is needed; check {check}"
            )
        if not tensors[key].dtype.is_floating_point and tensor.dtype.is_floating_point:
            raise InvalidWeights(
                f"the weights hold {tensors[key].dtype} in {key!r}: save them as floating point numbers"
            )
        if not torch.isfinite(tensors[key].to(tensor.dtype)).all():
            raise InvalidWeights(f"the weights hold numbers that are not finite in {key!r}")
    network.load_state_dict(tensors)
