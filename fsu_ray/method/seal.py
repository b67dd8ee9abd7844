"""Sealing: D' with all masks written into it, so that what was erased can be drawn from it no more."""

from __future__ import annotations

import torch

from fsu_ray.errors import InvalidData
from fsu_ray.method.masking import MaskedDataset, StaticMaskInputs
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.models.networks import Classifier
from fsu_ray.records import ModelSpec
from fsu_ray.work import BlobStore, EarlierErasure


def seal(
    store: BlobStore, spec: ModelSpec, root: str, dataset: str, earlier_erasures: tuple[EarlierErasure, ...]
) -> str:
    """The digest of a new D': that of `dataset` under the masks of all `priors`, with the labels of `root`.

    A sample that is D_e-like under a mask is left out (the erasure's probes keep it); of the others, the logits of
    the classes that a mask has taken are -inf, so their soft labels have no mass there. Raises InvalidData where
    nothing would be left.
    """
    teacher = Classifier.from_bytes(spec, store.get(root))
    old = Synthetic.from_bytes(store.get(dataset))
    masking = MaskedDataset(StaticMaskInputs(store, teacher, earlier_erasures, spec.classes), old, dataset)
    allowed = masking.allowed()
    kept = allowed.any(1)
    for mask in masking.earlier:
        kept &= ~mask.is_forget
    if not bool(kept.any()):
        raise InvalidData("nothing of D' would be left under the masks of this line: there is nothing to seal")
    new = Synthetic(
        pixels=old.pixels[kept],
        logits=old.logits.masked_fill(~allowed, -torch.inf)[kept],
        entropy=old.entropy[kept],
        condition=old.condition[kept],
        holdout=old.holdout[kept],
    )
    return store.put(new.to_bytes())
