"""Figures 4, 9 and 10: samples of generators, and the samples of D' that the filter takes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fsu_ray.experiments import images
from fsu_ray.experiments.catalogue import Cell, CellContext, CellType, Row, Scale, Table, Work
from fsu_ray.experiments.images import FEW
from fsu_ray.experiments.markdown import table
from fsu_ray.experiments.mnist import target_samples
from fsu_ray.method import filter as filtration
from fsu_ray.method.augment import seeded
from fsu_ray.method.fit import predict
from fsu_ray.method.synthesize import Synthetic
from fsu_ray.recipes import FilterRecipe

PER_CLASS = 10  # samples of a class in a picture
WITHOUT = {"bn": "BN", "augmentation": "augmentation", "diversity": "diversity", "tv": "total variation"}
"""Losses that an inverter is trained without: name in a recipe, name in a report."""


def grid(pixels: Tensor, scale: int = 2, boxes: dict[tuple[int, int], tuple[int, int, int]] | None = None) -> bytes:
    """A PNG of pixels (rows, columns, C, H, W) uint8, enlarged `scale` times, with gaps between images.

    `boxes` gives the colours of frames by (row, column).
    """
    rows, columns, channels, height, width = pixels.shape
    gap, high, wide = 3, height * scale, width * scale
    canvas = torch.full((rows * (high + gap) + gap, columns * (wide + gap) + gap, 3), 255, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            image = pixels[r, c].expand(3, -1, -1) if channels == 1 else pixels[r, c]
            top, left = gap + r * (high + gap), gap + c * (wide + gap)
            if boxes and (r, c) in boxes:
                framed = canvas[top - gap : top + high + gap, left - gap : left + wide + gap]
                framed[:] = torch.tensor(boxes[r, c], dtype=torch.uint8)
            enlarged = image.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            canvas[top : top + high, left : left + wide] = enlarged
    out = io.BytesIO()
    Image.fromarray(canvas.numpy()).save(out, "PNG", optimize=True)
    return out.getvalue()


@torch.no_grad()
def _samples(cell: Cell, context: CellContext) -> list[Row]:
    """A picture with a column for each class, of the generator's first samples: none is left out."""
    (original,), (inverter,) = context.needs
    classifier = images.load(original, context)
    generator = images.load_generator(inverter, classifier.spec, context)
    classes = classifier.spec.classes
    y = torch.arange(classes).repeat(PER_CLASS)
    z = torch.randn((len(y), generator.latent), generator=seeded(cell["seed"], 77))
    drawn = (generator.eval()(z.to(context.device), y.to(context.device)).float() * 255).round().byte().cpu()
    right = (predict(classifier, drawn).argmax(1) == y).float().mean()
    picture = grid(drawn.view(PER_CLASS, classes, *drawn.shape[1:]))
    return [{"seed": cell["seed"], "arch": original["arch"], "scenario": original["scenario"], "right": float(right),
             "without": cell.get("without"), "png": picture}]  # fmt: skip


def _filtered(cell: Cell, context: CellContext) -> list[Row]:
    """The sorted distances of D', t_f, and a picture: a column for each class, the filter's samples in boxes."""
    (original,), (drawn,) = context.needs
    dataset, classifier = Synthetic.from_bytes(context.store.get(drawn["dataset"])), images.load(original, context)
    data, what, _ = images.SCENARIOS[original["scenario"]]
    behaviour, pixels = target_samples(images.bench(data), what, cell["seed"], cell["rho"])
    recipe = FilterRecipe.model_validate(cell["filter"])
    features, examples = (filtration.extract_features(classifier, group) for group in (dataset.pixels, pixels))
    distances = filtration.distances(features, examples, recipe.metric)
    logits = (dataset.logits, predict(classifier, pixels))
    mask = filtration.select(recipe, behaviour, features, dataset.predicted, examples, logits)
    threshold = mask.threshold or 0.0
    shown = torch.stack(
        [(dataset.condition == k).nonzero().flatten()[:PER_CLASS] for k in range(classifier.spec.classes)], 1
    )
    low = float(distances.min())
    boxes = {}
    for r in range(PER_CLASS):
        for c in range(shown.shape[1]):
            if mask.is_forget[shown[r, c]]:
                near = (float(distances[shown[r, c]]) - low) / max(threshold - low, 1e-9)
                boxes[r, c] = (235, round(200 * min(1.0, max(0.0, near))), 40)
    predicted = torch.bincount(dataset.predicted[mask.is_forget], minlength=classifier.spec.classes).tolist()
    return [{"seed": cell["seed"], "arch": original["arch"], "policy": mask.policy, "threshold": threshold,
             "distances": distances.sort().values.tolist(), "alone": int((distances <= threshold).sum()),
             "taken": int(mask.is_forget.sum()), "predicted": predicted,
             "png": grid(dataset.pixels[shown], boxes=boxes)}]  # fmt: skip


def samples(inverter: Cell, without: str | None = None) -> Work:
    """A picture of a generator's samples; `without` is the loss that it was trained without."""
    cell = {"generator": inverter, "seed": inverter["seed"]}
    return "samples", cell if without is None else {**cell, "without": without}


def _inverter(scale: Scale, seed: int, without: str | None = None) -> Cell:
    """The cell of LeNet5's inverter."""
    original = images.classifier("class9", "lenet5", seed, scale)
    return images.inverter(original, scale, {"weights": {without: 0}} if without else {})


def _figure4a(scale: Scale, seeds: int) -> list[Work]:
    works: list[Work] = []
    for seed in range(seeds):
        drawn = images.dataset(_inverter(scale, seed), {})
        for policy in ("leave-one-out", "knee"):
            recipe = FilterRecipe(policy=policy).model_dump(mode="json")
            works.append(("filtered", {"dataset": drawn, "rho": FEW, "filter": recipe, "seed": seed}))
    return works


def _figure4a_report(rows: list[Row], folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    figure, axis = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    axis.plot(first[0]["distances"])
    for row, colour in zip(first, ("tab:red", "tab:orange"), strict=False):
        axis.axhline(row["threshold"], color=colour, label=f"{row['policy']}: {row['threshold']:.3f}")
    axis.set(xlabel="samples of D', nearest first", ylabel="distance to the given samples", title="class 9, LeNet5")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(folder / "figure4a.png", dpi=110)
    pyplot.close(figure)
    lines = [
        [str(row["seed"]), row["policy"], f"{row['threshold']:.3f}", str(row["alone"]), str(row["taken"]),
         str(len(row["distances"]))]
        for row in rows
    ]  # fmt: skip
    columns = ["seed", "policy", "t_f", "nearer than t_f", "taken: and seen as a 9", "of"]
    return (
        "![figure 4a](figure4a.png)\n\n" + table(columns, lines)
        + "\nEq. 9 as a distance: one minus the mean of the kernel over the given samples (3 %). `knee` is the paper's "
        "threshold, kneed's knee no lower than the mean leave-one-out distance within the given samples; "
        "`leave-one-out`, the largest of those, is the default for a subset. For a class the default takes all that "
        "the classifier sees as that class.\n"
    )  # fmt: skip


def _figure4b_report(rows: list[Row], folder: Path) -> str:
    parts = []
    for row in rows:
        if row["seed"] == rows[0]["seed"]:
            name = f"figure4b.{row['policy']}.png"
            (folder / name).write_bytes(row["png"])
            parts.append(
                f"![{row['policy']}]({name})\n\nBy `{row['policy']}`: {row['taken']} of {len(row['distances'])} "
                f"samples are taken, by predicted class {row['predicted']}.\n"
            )
    return "\n".join(parts) + (
        f"\nA column for each class that the generator was asked for, with its first {PER_CLASS} samples of D'. "
        "Boxes are the samples that the filter takes, from red (near) to yellow (near t_f).\n"
    )


def _pictures_report(name: str, about: str) -> Callable[[list[Row], Path], str]:
    """A report with one picture for each variant, of the first seed."""

    def report(rows: list[Row], folder: Path) -> str:
        parts = [about]
        for row in rows:
            if row["seed"] == rows[0]["seed"]:
                title = f"without {WITHOUT[row['without']]}" if row["without"] else row["arch"]
                file = f"{name}.{(row['without'] or row['arch']).replace(':', '-')}.png"
                (folder / file).write_bytes(row["png"])
                parts.append(
                    f"![{title}]({file})\n\n{title}: {100 * row['right']:.0f} % are classified as the class that was "
                    "asked for."
                )
        return "\n\n".join(parts) + f"\n\nA column for each class, with its first {PER_CLASS} samples.\n"

    return report


def _figure9(scale: Scale, seeds: int) -> list[Work]:
    works = []
    for arch in ("lenet5", "resnet50:8") if scale == "small" else ("lenet5", "resnet50"):
        original = images.classifier("class9", arch, 0, scale)
        works.append(samples(images.inverter(original, scale)))
    return works


def _figure10(scale: Scale, seeds: int) -> list[Work]:
    return [samples(_inverter(scale, 0, loss), loss) for loss in ("augmentation", "diversity", "tv")]


def _drawn_by(cell: Cell) -> list[Work]:
    return [("classifier", cell["generator"]["classifier"]), ("generator", cell["generator"])]


def _on_dataset(cell: Cell) -> list[Work]:
    return [images.teacher(cell["dataset"]), ("dataset", cell["dataset"])]


CELL_TYPES = {
    "samples": CellType(_samples, _drawn_by, gpu=True),
    "filtered": CellType(_filtered, _on_dataset, gpu=True),
}
TABLES = {
    "figure4a": Table(_figure4a, _figure4a_report),
    "figure4b": Table(_figure4a, _figure4b_report),
    "figure4c": Table(
        lambda scale, seeds: [samples(_inverter(scale, 0, "bn"), "bn")],
        _pictures_report("figure4c", "LeNet5, class 9's classifier, inverted without the BN loss of eq. 6."),
    ),
    "figure9": Table(_figure9, _pictures_report("figure9", "What the inverters of two networks draw.")),
    "figure10": Table(_figure10, _pictures_report("figure10", "LeNet5, inverted without one loss.")),
}  # fmt: skip
