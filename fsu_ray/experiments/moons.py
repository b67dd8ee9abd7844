"""Figures 2 and 3 and Table 1: few-shot unlearning of the moons' sparse GP (section 4.1).

KL is KL(reference || unlearned) of the predictive probabilities, computed by quadrature and averaged over all 20 points
of D_e, whatever part of them is given. The paper does not define its KL. Of the definitions that were tried, only this
one gives the paper's values for EUBO and RKL. The mean over all 100 points is reported too.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fsu_ray.experiments.catalogue import Cell, CellContext, CellType, Row, Scale, Table, Work
from fsu_ray.experiments.markdown import spread, table
from fsu_ray.method import moons as ours
from fsu_ray.method.baselines import variational
from fsu_ray.method.baselines.sparse_gp import SparseGP, divergence
from fsu_ray.method.baselines.variational import Descent
from fsu_ray.method.datasets import moons

NUMBER, ERASED = 100, 20
RHO = 0.25
RHOS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
CUTS = (1e-5, 1e-9, 0.0)  # the lambdas of EUBO and RKL
SUBSETS = 5  # draws of D_e,rho for each generator of Table 1
PAPER = {
    "Ours": (0.306, 0.015), "EUBO 1e-05": (0.004, 0.394), "EUBO 1e-09": (0.012, 0.313), "EUBO 0": (0.008, 0.340),
    "RKL 1e-05": (0.003, 0.432), "RKL 1e-09": (0.007, 0.348), "RKL 0": (0.012, 0.304),
}  # fmt: skip
"""Table 1: KL to the original and to the oracle."""
SIZES = {"steps": 1000, "descent": 2500, "batches": 1500, "cut": 1e-9}
"""Figures 2 and 3: steps of the inversion and of EUBO's descent, batches of RKL, and the lambda of both."""
SIDE = 60  # pixels of a decision map
EXTENT = LEFT, RIGHT, LOW, HIGH = (-1.8, 2.8, -1.2, 1.7)


@dataclass(frozen=True)
class Setting:
    """The points (100, 2), their labels, the mask of D_e (100,), the model of all points, and the model without D_e."""

    x: Tensor
    y: Tensor
    erased: Tensor
    original: SparseGP
    oracle: SparseGP


@functools.cache
def setting() -> Setting:
    """The setting of Nguyen et al.: D_e are the 20 rightmost points, 19 of them of class 1."""
    x, y = moons(NUMBER)
    order = x[:, 0].argsort()
    x, y = x[order], y[order]
    erased = torch.arange(NUMBER) >= NUMBER - ERASED
    precisions = torch.tensor([2.4232, 1.8230], dtype=torch.float64)
    original = SparseGP(moons(20)[0], 4.7432, precisions).fitted(x, y)
    return Setting(x, y, erased, original, original.fitted(x[~erased], y[~erased]))


def subset(rho: float, seed: int) -> Tensor:
    """The sorted positions of D_e,rho, a random share of D_e."""
    order = torch.randperm(ERASED, generator=torch.Generator().manual_seed(seed))
    return (NUMBER - ERASED + order[: round(rho * ERASED)]).sort().values


def eubo(problem: Setting, given: Tensor, cut: float, seed: int, steps: int) -> SparseGP:
    """The original without the given points, by EUBO: exact where `cut` is 0, else by `steps` of Adam."""
    gp, x, y = problem.original, problem.x[given], problem.y[given]
    if not cut:
        posterior = variational.eubo(gp.q, lambda q: gp.expected_log_likelihood(x, y, q))
    else:
        posterior = variational.eubo_sampled(gp.q, _likelihood(problem, given), cut, seed, Descent(steps=steps))
    return replace(gp, posterior=posterior)


def rkl(problem: Setting, given: Tensor, cut: float, seed: int, batches: int) -> SparseGP:
    """The original without the given points, by RKL."""
    posterior = variational.rkl(problem.original.q, _likelihood(problem, given), cut, seed, batches)
    return replace(problem.original, posterior=posterior)


def _likelihood(problem: Setting, given: Tensor) -> variational.LogLikelihood:
    signs = 2 * problem.y[given] - 1
    rows = signs[:, None] * problem.original.project(problem.x[given])
    return lambda u: torch.nn.functional.logsigmoid(u @ rows.T).sum(1)


def divergences(problem: Setting, gp: SparseGP) -> dict[str, float]:
    """KL of `gp` from original and oracle, nats: means over D_e and over all points."""
    means: dict[str, float] = {}
    p = gp.probability(problem.x)
    for name, reference in (("original", problem.original), ("oracle", problem.oracle)):
        by_point = divergence(reference.probability(problem.x), p)
        means |= {f"De_{name}": float(by_point[problem.erased].mean()), f"all_{name}": float(by_point.mean())}
    return means


def _ours(problem: Setting, generator: ours.PointGenerator, given: Tensor, recipe: ours.MoonsRecipe) -> SparseGP:
    return ours.unlearn(problem.original, generator, problem.x[given], problem.y[given], recipe, NUMBER)


# Table 1


def _table1_cells(scale: Scale, seeds: int) -> list[Work]:
    works: list[Work] = [("moons-ours", {"seed": seed, "steps": 1000}) for seed in range(seeds)]
    return works + [("moons-bayes", {"seed": seed, "steps": 2500, "batches": 1500}) for seed in range(seeds)]


VARIANTS = {
    "Ours": {}, "Ours, nothing filtered": {"policy": "none"}, "Ours, t_f at the knee": {"policy": "knee"},
    "Ours, logit of the target 0": {"mode": "unsure"}, "Ours, target renormalised away": {"mode": "renormalise"},
}  # fmt: skip


def _row(problem: Setting, method: str, gp: SparseGP, seed: int, given: int) -> Row:
    return {"method": method, "seed": seed, "subset": given, **divergences(problem, gp)}


def _table1_ours(cell: Cell, context: CellContext) -> list[Row]:
    problem, seed = setting(), cell["seed"]
    recipe = ours.MoonsRecipe(seed=seed, steps=cell["steps"])
    generator = ours.invert(problem.original, recipe)
    return [
        _row(
            problem,
            name,
            _ours(problem, generator, subset(RHO, number), recipe.model_copy(update=change)),
            seed,
            number,
        )
        for name, change in VARIANTS.items()
        for number in range(SUBSETS)
    ]


def _table1_bayes(cell: Cell, context: CellContext) -> list[Row]:
    problem, seed = setting(), cell["seed"]
    given = subset(RHO, seed)
    rows = [_row(problem, "original", problem.original, seed, seed)]
    for cut in CUTS:
        rows.append(_row(problem, f"EUBO {cut:g}", eubo(problem, given, cut, seed, cell["steps"]), seed, seed))
        rows.append(_row(problem, f"RKL {cut:g}", rkl(problem, given, cut, seed, cell["batches"]), seed, seed))
    return rows


def _table1_report(rows: list[Row], folder: Path) -> str:
    lines = []
    for method in ("original", *sorted(PAPER, key=lambda name: list(PAPER).index(name)), *list(VARIANTS)[1:]):
        of_method = [row for row in rows if row["method"] == method]
        paper = [f"{value:.3f}" for value in PAPER[method]] if method in PAPER else ["-", "-"]
        here = [spread((row[key] for row in of_method), 3) for key in ("De_original", "De_oracle", "all_oracle")]
        lines.append([method, paper[0], here[0], paper[1], here[1], here[2]])
    seeds = sorted({row["seed"] for row in rows})
    columns = [
        "method",
        "paper: to original",
        "to original",
        "paper: to oracle",
        "to oracle",
        "to oracle, all 100 points",
    ]
    return (
        f"KL(reference || unlearned), mean over D_e, nats; D_e,rho: a random 5 of 20. EUBO and RKL: seeds {seeds}, one "
        f"draw of D_e,rho each. Ours: one generator a seed, each with {SUBSETS} draws. The number after EUBO and RKL "
        "is lambda.\n\n" + table(columns, lines)
        + "\nThe paper does not define the KL of Table 1. The mean over D_e, this direction and a random D_e,rho are "
        "inferred: under this definition EUBO and RKL have the paper's values. The paper does not say how Ours is done "
        "here. The form (Otsu's threshold, D_e-like points dropped) was chosen in earlier work by its distance to the "
        "oracle, on other generators and draws. The row 'nothing filtered' shows the inversion before any filter. The "
        "distance of Ours depends on the basis of f_e, in which eq. 5 measures an L1 distance. Here the basis is the "
        "Cholesky factor of Kuu, with the inducing inputs in scikit-learn's order. With the symmetric root, which does "
        "not depend on an order, three generators came to .055 to .076 from the oracle, and their row 'nothing "
        "filtered' to .001 to .004 from the original.\n"
    )  # fmt: skip


# Figure 3


def _figure3_cells(scale: Scale, seeds: int) -> list[Work]:
    return [("moons-by-rho", SIZES | {"seed": seed}) for seed in range(seeds)]


def _figure3(cell: Cell, context: CellContext) -> list[Row]:
    problem, seed = setting(), cell["seed"]
    recipe = ours.MoonsRecipe(seed=seed, steps=cell["steps"])
    generator = ours.invert(problem.original, recipe)

    def unlearned() -> Iterator[tuple[str, float, SparseGP]]:
        for rho in RHOS:
            given = subset(rho, seed)
            yield "Ours", rho, _ours(problem, generator, given, recipe)
            yield "EUBO", rho, eubo(problem, given, cell["cut"], seed, cell["descent"])
            yield "RKL", rho, rkl(problem, given, cell["cut"], seed, cell["batches"])

    return [{"method": method, "rho": rho, "seed": seed, **divergences(problem, gp)} for method, rho, gp in unlearned()]


def _figure3_report(rows: list[Row], folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    lines = []
    for method in ("Ours", "EUBO", "RKL"):
        values = [[row["De_oracle"] for row in rows if (row["method"], row["rho"]) == (method, rho)] for rho in RHOS]
        means = [statistics.fmean(v) for v in values]
        deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axis.errorbar(RHOS, means, yerr=deviations, marker="o", capsize=3, label=method)
        lines.append([method, *(spread(v, 3) for v in values)])
    axis.set(xlabel="rho", ylabel="KL(oracle || unlearned), mean over D_e", title="moons, lambda 1e-9")
    axis.set_ylim(bottom=0)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(folder / "figure3.png", dpi=110)
    pyplot.close(figure)
    return (
        "![figure 3](figure3.png)\n\nKL(oracle || unlearned), mean over D_e, lambda 1e-9, by rho; mean ± deviation over"
        f" {len({row['seed'] for row in rows})} draws of D_e,rho, each with its own generator.\n\n"
        + table(["method", *(f"{rho:g}" for rho in RHOS)], lines)
        + "\nAs in the paper, Ours does not depend on rho and the other two do. At rho = 1 EUBO erases more than the "
        "oracle, and RKL comes near to the oracle because a few of each batch of 1,000 draws carry all the weight.\n"
    )


# Figure 2


def _figure2_cells(scale: Scale, seeds: int) -> list[Work]:
    return [("moons-maps", SIZES | {"seed": seeds - 1, "side": SIDE})]


def _figure2(cell: Cell, context: CellContext) -> list[Row]:
    problem, seed = setting(), cell["seed"]
    few, every = subset(RHO, seed), subset(1.0, seed)
    recipe = ours.MoonsRecipe(seed=seed, steps=cell["steps"])
    generator = ours.invert(problem.original, recipe)
    maps = {
        "Original": problem.original,
        "Oracle": problem.oracle,
        "Ours, all of D_e": _ours(problem, generator, every, recipe),
        "EUBO, all of D_e": eubo(problem, every, cell["cut"], seed, cell["descent"]),
        "RKL, all of D_e": rkl(problem, every, cell["cut"], seed, cell["batches"]),
        "Ours, 5 points": _ours(problem, generator, few, recipe),
        "EUBO, 5 points": eubo(problem, few, cell["cut"], seed, cell["descent"]),
        "RKL, 5 points": rkl(problem, few, cell["cut"], seed, cell["batches"]),
    }
    across, up = (torch.linspace(*ends, cell["side"], dtype=torch.float64) for ends in ((LEFT, RIGHT), (LOW, HIGH)))
    points = torch.cartesian_prod(up, across).flip(1)
    return [
        {
            "method": name,
            "seed": seed,
            **divergences(problem, gp),
            "map": [round(p, 4) for p in gp.probability(points).tolist()],
        }
        for name, gp in maps.items()
    ]


def _figure2_report(rows: list[Row], folder: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problem, seed = setting(), rows[0]["seed"]
    by_name = {row["method"]: row for row in rows}
    panels = [None, *by_name]  # the data first
    figure, axes = pyplot.subplots(3, 3, figsize=(9, 7), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.flat, panels, strict=True):
        given = subset(1.0 if name is None or "all" in name else RHO, seed)
        if name is not None:
            side = round(len(by_name[name]["map"]) ** 0.5)
            drawn = torch.tensor(by_name[name]["map"]).view(side, side)
            axis.imshow(
                drawn,
                origin="lower",
                extent=EXTENT,
                vmin=0,
                vmax=1,
                cmap="viridis",
                aspect="auto",
                interpolation="nearest",
            )
            axis.contour(drawn, levels=[0.5], extent=EXTENT, colors="white", linewidths=1)
        colours = ["gold" if label else "royalblue" for label in problem.y]
        axis.scatter(*problem.x.T, c=colours, s=9, edgecolors="black", linewidths=0.3)
        if name is None or name not in ("Original", "Oracle"):
            axis.scatter(*problem.x[given].T, marker="x", c="red", s=28, linewidths=1.2)
        axis.set_title(name or "data; D_e crossed", fontsize=10)
    figure.savefig(folder / "figure2.png", dpi=100)
    pyplot.close(figure)
    lines = [[name, f"{row['De_original']:.3f}", f"{row['De_oracle']:.3f}"] for name, row in by_name.items()]
    return (
        "![figure 2](figure2.png)\n\nThe probability of class 1 (yellow); the line is at one half; red crosses are the "
        f"points that are given (seed {seed}). EUBO and RKL at lambda 1e-9. KL(reference || map), mean over D_e:\n\n"
        + table(["map", "to original", "to oracle"], lines)
    )


TABLES = {
    "figure2": Table(_figure2_cells, _figure2_report),
    "figure3": Table(_figure3_cells, _figure3_report),
    "table1": Table(_table1_cells, _table1_report),
}
CELL_TYPES = {
    "moons-maps": CellType(_figure2),
    "moons-by-rho": CellType(_figure3),
    "moons-ours": CellType(_table1_ours),
    "moons-bayes": CellType(_table1_bayes),
}
