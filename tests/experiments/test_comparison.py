"""Tables 2 and 4: shared cells, the choice of Fisher's strengths, the report beside the paper's values."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsu_ray.experiments import comparison
from fsu_ray.experiments.catalogue import Row, Work, find_cell_type
from fsu_ray.experiments.images import teacher
from fsu_ray.experiments.reproduce import _key


def kinds(works: list[Work]) -> dict[tuple[str, str], int]:
    """How many different cells there are, with those that they need, by network and kind."""
    seen: dict[str, tuple[str, str]] = {}
    waiting = list(works)
    while waiting:
        kind, cell = waiting.pop()
        text = repr(cell)
        arch = next((arch for arch in ("lenet5", "preactresnet18", "resnet50") if arch in text), "none")
        seen[_key((kind, cell))] = (arch, kind)
        waiting += find_cell_type(kind).needs(cell)
    return {each: list(seen.values()).count(each) for each in set(seen.values())}


def test_a_deep_network_has_one_inverter_for_all_seeds() -> None:
    """LeNet5 has one for each seed; the seeds of a deep network differ in the draw and thus in the erasure."""
    counts = kinds(comparison.TABLES["table2a"].cells("small", 3))
    assert [counts["lenet5", kind] for kind in ("classifier", "generator", "oracle", "erasure")] == [3, 3, 6, 12]
    assert [counts["preactresnet18", kind] for kind in ("classifier", "generator", "oracle", "erasure")] == [
        1,
        1,
        2,
        12,
    ]
    assert counts["none", "gan"] == 3, "whatever network is to be unlearned"
    large = kinds(comparison.TABLES["table2a"].cells("paper", 3))
    assert {arch for arch, _ in large} == {"preactresnet18", "none"}
    assert large["preactresnet18", "generator"] == 3


def test_a_network_is_unlearned_by_its_own_recipe() -> None:
    """A deep network's D' is surer of its classes: what is left of a sample's own class is less there."""
    cells = [cell for kind, cell in comparison.TABLES["table2b"].cells("small", 1) if kind == "erasure"]
    least = {teacher(cell["dataset"])[1]["arch"]: cell["recipe"]["filter"]["runner_up"] for cell in cells}
    assert least == {"lenet5": 0.2, "preactresnet18:8": 0.05}
    inverters = [cell for kind, cell in comparison.TABLES["table4c"].cells("small", 1) if kind == "erasure"]
    forms = {cell["dataset"]["generator"]["invert"]["form"] for cell in inverters if cell["variant"] == "Ours"}
    assert forms == {"relative"}, "53 BatchNorm layers drown the rest otherwise"


def test_tables_share_what_they_have_in_common() -> None:
    """All of LeNet5's Table 4a is in Table 2a."""
    two, four = ({_key(work) for work in comparison.TABLES[name].cells("small", 2)} for name in ("table2a", "table4a"))
    assert four < two


def test_an_oracle_is_that_of_its_classifier() -> None:
    """Not of the repeat."""
    cells = [cell for kind, cell in comparison.TABLES["table4d"].cells("small", 3) if kind == "oracle"]
    assert [cell["seed"] for cell in cells] == [0, 0]
    assert cells[0]["classifier"]["arch"] == "resnet50:8"


@pytest.mark.parametrize(
    ("metrics", "scenario", "expected"),
    [
        ({1e-8: (99, 98), 1e-7: (97, 96), 1e-6: (50, 40), 1e-5: (20, 3), 1e-4: (10, 0)}, "class9", (1e-7, 1e-5)),
        ({1e-8: (99, 98), 1e-7: (96, 97.9), 1e-6: (50, 40)}, "class9", (1e-7, None)),
        ({1e-8: (99, 40), 1e-7: (98, 42), 1e-6: (60, 91)}, "crossed7", (1e-7, 1e-6)),
        ({1e-8: (9, 40)}, "crossed7", (None, None)),
    ],
)
def test_fishers_strengths(
    metrics: dict[float, tuple[float, float]], scenario: str, expected: tuple[float | None, float | None]
) -> None:
    """The smallest that moves D_e and holds D_r, else the largest that holds it; the smallest that erases."""
    rows = [{"alpha": alpha, "D_r": r + d, "D_e": e} for alpha, (r, e) in metrics.items() for d in (-0.5, 0.5)]
    assert comparison.fisher_strengths(rows, scenario, 99.0, 98.0 if scenario == "class9" else 40.0) == expected


def test_each_network_has_a_table_of_its_own(tmp_path: Path) -> None:
    """Means and deviations beside the paper's; the refused are counted."""
    rows: list[Row] = []
    for arch in ("lenet5", "preactresnet18:8"):
        same = {"arch": arch, "seed": 0}
        rows.append({"piece": "classifier", "D_r": 99.4, "D_e": 99.0, **same})
        rows += [{"piece": "oracle", "how": how, "epochs": 6, "D_r": 99.5, "D_e": 0.0, **same}
                 for how in ("scratch", "finetuned")]  # fmt: skip
        for rho in (1.0, 0.03):
            rows += [{"piece": "erasure", "variant": "Ours", "rho": rho, "refused": refused, **same, "seed": seed,
                      "D_r": 99.0 + seed, "D_e": 0.1} for seed, refused in ((0, ""), (1, "not_forgotten"))]  # fmt: skip
            rows += [{"piece": "bayes", "method": method, "rho": rho, "D_r": d_r, "D_e": 0.0, "full_D_r": 99.3,
                      "full_D_e": 98.5, **same} for method, d_r in (("eubo", 30.0), ("rkl", 97.0))]  # fmt: skip
            rows += [{"piece": "fisher", "rho": rho, "alpha": 1e-7, "D_r": 98.0, "D_e": 90.0, **same}]
    text = comparison.TABLES["table2a"].report(rows, tmp_path)
    lenet, deep = text.split("**preactresnet18:8**")
    assert "| Original | 99.31 | 99.40 | 99.20 | 99.00 |  |" in lenet
    assert "| Oracle, from scratch, 6 epochs | - | 99.50 | - | 0.00 |  |" in lenet
    assert "| Ours | 98.41 ± 0.32 | 99.50 ± 0.71 | 0.60 ± 0.22 | 0.10 ± 0.00 | 1 of 2 refused |" in lenet
    assert "| Ours | 98.43 ± 0.92 | 99.50 ± 0.71 | 0.18 ± 0.27 | 0.10 ± 0.00 | 1 of 2 refused |" in deep
    assert "| Fisher_1 | 96.62 ± 1.30 | 98.00 | 98.12 ± 1.18 | 90.00 | lambda 1e-07 |" in deep
    assert "| Original, its last layer Bayesian | - | 99.30 | - | 98.50 |  |" in deep
    assert "| EUBO | 35.67 ± 1.51 | 30.00 | 0.00 ± 0.00 | 0.00 | lambda 0 |" in deep
    assert "| RKL | 97.57 ± 0.17 | 97.00 | 75.46 ± 4.36 | 0.00 | lambda 0 |" in deep
    assert "| Fisher_2 | 20.04 ± 6.66 | - | 0.62 ± 1.39 | - | no strength does |" in deep
    assert "All seeds share one classifier" in deep
    assert "All seeds share one classifier" not in lenet
    large = [{**row, "arch": "preactresnet18"} for row in rows if row["arch"] == "preactresnet18:8"]
    text = comparison.TABLES["table2a"].report(large, tmp_path)
    assert "| Ours | 98.43 ± 0.92 | 99.50 ± 0.71 | 0.18 ± 0.27 |" in text, "the paper's of this network"
    assert "All seeds share one classifier" not in text
