"""Training a classifier in this process: for demos and tests, where no trained weights are at hand."""

from __future__ import annotations

from functools import partial

from fsu_ray.records import ModelSpec, ProgressCallback


def train(
    data: str,
    arch: str,
    epochs: int,
    seed: int,
    shape: tuple[int, int, int] | None,
    on_progress: ProgressCallback | None,
) -> tuple[ModelSpec, bytes]:
    """See `Service.train`."""
    import torch

    from fsu_ray.method.datasets import load
    from fsu_ray.method.fit import TrainingSchedule, fit
    from fsu_ray.method.precision import default_device
    from fsu_ray.models.classifier import Classifier

    shape = shape or ((3, 32, 32) if data == "cifar10" else (1, 32, 32))
    images = load(data, "train", shape)
    unit = images.pixels.float() / 255  # (N, C, H, W), pixels in [0, 1]
    spec = ModelSpec(
        arch=arch,
        channels=shape[0],
        height=shape[1],
        width=shape[2],
        classes=int(images.labels.max()) + 1,
        mean=tuple(round(float(v), 4) for v in unit.mean((0, 2, 3))),
        std=tuple(max(round(float(v), 4), 0.01) for v in unit.std((0, 2, 3))),
        flip=data == "cifar10",
    )

    on_epoch = partial(on_progress, "train") if on_progress else None
    torch.manual_seed(seed)
    classifier = Classifier(spec).to(default_device())
    schedule = TrainingSchedule(epochs=epochs, batch=min(128, max(16, len(images) // 20)), seed=seed)
    fit(classifier, images.pixels, images.labels, schedule, flip=spec.flip, on_epoch=on_epoch)
    return spec, classifier.to_bytes()
