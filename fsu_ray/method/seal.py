"""Sealing: D' with all masks written into it, so that it holds nothing of what was erased."""

from __future__ import annotations

import torch

from fsu_ray.errors import InvalidData
from fsu_ray.method.masking import MaskedDataset
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.models.classifier import Classifier
from fsu_ray.records import Digest, ModelSpec
from fsu_ray.work import BlobStore, EarlierErasure


def seal(
    store: BlobStore, spec: ModelSpec, root: str, dataset: str, earlier_erasures: tuple[EarlierErasure, ...]
) -> Digest:
    """Store D' `dataset` with the masks of `earlier_erasures` written into it, and return the digest of the new D'.

    `root` are the weights that labelled it. D_e-like samples are left out (the probes keep them). In the logits of the
    others, the classes that a mask took are -inf, so their soft labels have no mass there. Raises InvalidData where no
    sample would be left.
    """
    teacher = Classifier.from_bytes(spec, store.get(root))
    old = Synthetic.from_bytes(store.get(dataset))
    masked = MaskedDataset(store, teacher, earlier_erasures, old, dataset)
    allowed = masked.allowed()
    retained = allowed.any(1) & masked.retained()
    if not bool(retained.any()):
        raise InvalidData("the masks of this model leave no sample of D': there is nothing to seal")
    new = Synthetic(
        pixels=old.pixels[retained],
        logits=old.logits.masked_fill(~allowed, -torch.inf)[retained],
        entropy=old.entropy[retained],
        condition=old.condition[retained],
        holdout=old.holdout[retained],
    )
    return store.put(new.to_bytes())
