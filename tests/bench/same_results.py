"""`python tests/bench/same_results.py --home FOLDER`: the digests that the runs of a checkout come to, as JSON.

Run it on two checkouts on one machine and compare what it prints: a refactoring must change no digest. It types the
commands a user would type, so that it works on every commit since 75c0af1:

    demo      `fsu demo`: an inversion, then a request that reuses the generator
    subset    a classifier with wrongly labelled sevens, and a subset request
    batch     three class requests in one run (`fsu run --coalesce`)
    resumed   a run that is interrupted after its first checkpoint of the inversion, and goes on from there
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SEVENS_AS_ONES = 40


class Checkout:
    """The commands of the checkout `tree`, in the folder `home`."""

    def __init__(self, tree: Path, home: Path, ledger: str | None) -> None:
        self.home = home
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FSU_")}
        self.environment |= {"PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
        if ledger:
            self.environment["FSU_LEDGER"] = ledger

    def start(self, *words: str) -> subprocess.Popen[str]:
        log = (self.home / "log").open("a")
        command = [sys.executable, "-m", *words]
        return subprocess.Popen(
            command, cwd=self.home, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True
        )

    def ask(self, *words: str) -> Any:
        """What a command prints as JSON. A request that the gate rejects ends with 4, which is no failure here."""
        process = self.start(*words)
        answer, _ = process.communicate()
        if process.returncode not in (0, 4):
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}; see {self.home / 'log'}")
        return json.loads(answer)


def digests(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must not change: the digests of weights and of D', how the generator was used, and the status."""
    return [
        {
            "behaviour": result["request"]["behaviour"]["name"],
            "status": result["request"]["status"],
            "generator_use": result["outcome"]["generator_use"],
            **{name: result["outcome"][name] for name in ("weights", "dataset", "generator_weights")},
        }
        for result in results
    ]


def write_data(folder: Path, seed: int) -> None:
    """The digits as PNG files, one folder a class, with sevens in the folder of the ones; samples beside them."""
    data, rng = load_digits(), np.random.default_rng(seed)
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    wrong = set(rng.permutation(np.flatnonzero(data.target == 7))[:SEVENS_AS_ONES].tolist())
    for split in ("train", "test"):
        for k in range(10):
            (folder / "data" / split / str(k)).mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(data.target.tolist()):
        given = 1 if i in wrong else label
        split = "train" if i % 4 or i in wrong else "test"
        Image.fromarray(pixels[i]).save(folder / "data" / split / str(given) / f"{i:04d}.png")
    for k in range(10):
        (folder / "samples" / str(k)).mkdir(parents=True)
        for i in np.flatnonzero(data.target == k)[:12]:
            Image.fromarray(pixels[i]).save(folder / "samples" / str(k) / f"{i:04d}.png")
    (folder / "samples" / "wrong").mkdir()
    for i in sorted(wrong)[:20]:
        Image.fromarray(pixels[i]).save(folder / "samples" / "wrong" / f"{i:04d}.png")


def submit(checkout: Checkout, model: str, name: str, kind: str, target: int, samples: str) -> None:
    """Queue a request with the recipe `digits`."""
    checkout.ask(
        "fsu_ray", "request", "submit", "--model", model, "--behaviour", name, "--kind", kind, "--target", str(target),
        "--samples", str(checkout.home / "samples" / samples), "--recipe", "digits", "--json",
    )  # fmt: skip


def resumed(checkout: Checkout) -> list[dict[str, Any]]:
    """Interrupt a run once it has a checkpoint, and let the next one go on."""
    runs, deadline = checkout.home / ".fsu" / "runs", time.monotonic() + 300
    earlier = set(runs.iterdir())
    process = checkout.start("fsu_ray", "run", "--model", "other", "--json")
    while process.poll() is None and not any(
        any(run.glob("checkpoint*/state.pt")) for run in set(runs.iterdir()) - earlier
    ):
        if time.monotonic() > deadline:
            raise SystemExit("no checkpoint after 300 s")
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate()
    results = checkout.ask("fsu_ray", "run", "--model", "other", "--json")
    if not results[0]["outcome"]["resumed"]:
        raise SystemExit("the second run did not go on from a checkpoint")
    return results


def main() -> None:
    """Run the scenarios and print what they came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2], help="the checkout")
    parser.add_argument("--home", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--ledger", help="a SQLAlchemy URL; default: SQLite below the home folder")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    home = options.home.resolve()
    home.mkdir(parents=True)
    checkout = Checkout(options.tree.resolve(), home, options.ledger)
    write_data(home, 0)
    came_to: dict[str, Any] = {"demo": digests(checkout.ask("fsu_ray", "demo", "--json")["results"])}
    for name, seed in (("wrong", "1"), ("other", "2")):
        checkout.ask("jobs.train", "--name", name, "--data", str(home / "data"), "--epochs", "20", "--seed", seed)
    submit(checkout, "wrong", "sevens-as-ones", "subset", 1, "wrong")
    came_to["subset"] = digests(checkout.ask("fsu_ray", "run", "--model", "wrong", "--json"))
    for k in (0, 2, 4):
        submit(checkout, "wrong", f"class-{k}", "class", k, str(k))
    came_to["batch"] = digests(checkout.ask("fsu_ray", "run", "--model", "wrong", "--coalesce", "--json"))
    submit(checkout, "other", "class-5", "class", 5, "5")
    came_to["resumed"] = digests(resumed(checkout))
    checkout.ask("fsu_ray", "audit", "verify", "--json")
    print(json.dumps(came_to, indent=2))


if __name__ == "__main__":
    main()
