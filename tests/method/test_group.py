"""Several processes on one batch: what they come to together is what one comes to alone. Real processes, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fsu_ray.method
from fsu_ray.method.group import Group

BEGIN = """
import sys, torch, torch.distributed as dist
from fsu_ray.errors import Stopped, UserError
from fsu_ray.method import invert
from fsu_ray.method.fit import TrainingSchedule, fit
from fsu_ray.method.group import Group
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator
from fsu_ray.method.synthesize import synthesize
from fsu_ray.recipes import InvertRecipe, SynthesizeRecipe
from fsu_ray.records import ModelSpec

folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
if size > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
group = Group.current()
assert (group.rank, group.size) == (rank, size)

def judge(arch="lenet5"):
    torch.manual_seed(0)
    spec = ModelSpec(arch=arch, channels=1, height=16, width=16, classes=3)
    made = Classifier(spec).train()
    with torch.no_grad():
        for _ in range(3):
            made(torch.rand(16, 1, 16, 16))
    return made.eval()

"""
END = """
torch.save(found, f"{folder}/found-{size}-{rank}")
if size > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a script that sets `found` in `size` processes; what each came to, by rank."""

    def run(script: str, size: int) -> list[Any]:
        root = str(Path(fsu_ray.method.__file__).parents[2])
        words = [sys.executable, "-c", BEGIN + script + END, str(tmp_path)]
        environment = os.environ | {"PYTHONPATH": root}
        started = [
            subprocess.Popen([*words, str(rank), str(size)], env=environment, stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        return [torch.load(tmp_path / f"found-{size}-{rank}", weights_only=False) for rank in range(size)]

    return run


INVERT = """
found = {}
for arch, form in (("lenet5", "norm"), ("preactresnet18:2", "squared")):
    recipe = InvertRecipe(steps=20, batch=15, width=2, latent=8, precision="float32", form=form)
    classifier, curve = judge(arch), []
    run = invert.begin(classifier, recipe)
    honest = invert.losses_of
    def recording(*arguments):
        losses = honest(*arguments)
        means = group.total(torch.stack([value.detach() for value in losses.values()])) / group.size
        curve.append(dict(zip(losses, means.tolist())))
        return losses
    invert.losses_of = recording
    invert.invert(classifier, recipe, run, group=group)
    invert.losses_of = honest
    found[arch] = (curve, {name: value.clone() for name, value in run.generator.state_dict().items()})
"""


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.slow
def test_an_inversion_is_the_same_for_any_number_of_ranks(found: Callable[..., list[Any]], size: int) -> None:
    """20 steps in float32: every loss within 1e-4 of one rank's at every step, eq. 5 and 6 and the generator's own
    BatchNorm over the whole batch, which does not divide evenly; the ranks end with one and the same generator."""
    (alone,) = found(INVERT, 1)
    together = found(INVERT, size)
    assert set(alone) == {"lenet5", "preactresnet18:2"}
    for arch, (curve, weights) in alone.items():
        assert len(curve) == 20
        assert set(curve[0]) == {"bn", "entropy", "augmentation", "diversity", "tv"}
        for rank in together:
            assert len(rank[arch][0]) == 20
            for step, (losses, expected) in enumerate(zip(rank[arch][0], curve, strict=True)):
                for name, value in expected.items():
                    assert losses[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (arch, step, name)
            for name, value in rank[arch][1].items():
                assert torch.equal(value, together[0][arch][1][name]), name
        first = together[0][arch][1]
        assert int(first["bn0.num_batches_tracked"]) == int(weights["bn0.num_batches_tracked"]) == 20
        torch.testing.assert_close(first["bn1.running_var"], weights["bn1.running_var"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(first["bn1.running_mean"], weights["bn1.running_mean"], rtol=1e-3, atol=1e-4)


SYNTHESIZE = """
torch.manual_seed(1)
classifier, generator = judge(), Generator(judge().spec, 2, 8)
classifier.network.fc3.weight.data *= 40  # sure of some samples, and not of others
generator.conv3.weight.data *= 300
generator.linear.weight.data[:, -3:] *= 8
recipe = SynthesizeRecipe(per_class=300, entropy_threshold=1.0, max_draws=3, rotation=5.0)
made, figures = synthesize(classifier, generator, recipe, group=group)
found = (made.to_bytes(), figures)
"""


@pytest.mark.slow
def test_a_data_set_is_the_same_for_any_number_of_ranks(found: Callable[..., list[Any]]) -> None:
    """Byte for byte, figures included, for the same generator; every rank has all of it."""
    (alone,) = found(SYNTHESIZE, 1)
    assert found(SYNTHESIZE, 2) == [alone, alone]
    assert len(set(alone[1]["acceptance"])) == 3  # the classes did not end in one round


FIT = """
torch.manual_seed(2)
pixels = torch.randint(0, 256, (50, 1, 16, 16), dtype=torch.uint8)
targets = torch.rand(50, 3).softmax(1)
still = torch.arange(50) < 20
classifier, heard = judge(), []
schedule = TrainingSchedule(epochs=3, batch=16, lr=0.05, one_cycle=False, frozen_statistics=True)
fit(classifier, pixels, targets, schedule, True, lambda *told: heard.append(told), still, group)
found = ({name: value.clone() for name, value in classifier.state_dict().items()}, heard)
"""


@pytest.mark.slow
def test_a_relearning_is_the_same_for_any_number_of_ranks(found: Callable[..., list[Any]]) -> None:
    """Weights and the loss of each epoch, up to rounding; batches that do not divide evenly."""
    ((weights, heard),) = found(FIT, 1)
    for others, told in found(FIT, 3):
        for name, value in weights.items():
            torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-6)
        assert [loss["loss"] for *_, loss in told] == pytest.approx([loss["loss"] for *_, loss in heard], rel=1e-5)


ERRORS = """
def only(wanted, error):
    def act():
        if group.rank == wanted:
            raise error
        return group.rank
    return act

found = []
for do, act in (
    (group.once, only(0, Stopped("stop"))), (group.once, only(1, Stopped("stop"))),
    (group.together, only(1, UserError("mend it"))), (group.together, only(7, None)),
    (group.once, only(0, ZeroDivisionError("by zero"))),
):
    try:
        found.append(do(act))
    except Exception as error:
        found.append((type(error).__name__, str(error), error.agreed))
"""


@pytest.mark.slow
def test_what_one_rank_raises_is_raised_on_all(found: Callable[..., list[Any]]) -> None:
    """So that none waits for another; `once` runs on the first rank alone and hands its result to the others."""
    stop, mend = ("Stopped", "stop", True), ("UserError", "mend it", True)
    broken = ("RunFailed", "ZeroDivisionError: by zero", True)
    assert found(ERRORS, 2) == [[stop, 0, mend, 0, broken], [stop, 0, mend, 1, broken]]


def test_a_group_of_one_needs_no_process_group() -> None:
    """Everything is what it is, and errors are not touched."""
    group, x = Group.current(), torch.rand(3, 4)
    assert group == Group(0, 1)
    assert group.total(x) is x
    assert group.gather(x, 3) is x
    assert group.everyone(5) == [5]
    assert group.parallel(module := torch.nn.Linear(2, 2)) is module
    with pytest.raises(ZeroDivisionError):
        group.once(lambda: 1 / 0)


@pytest.mark.parametrize("n", [5, 8, 64])
def test_shares_cut_a_batch_in_order(n: int) -> None:
    """Every sample is in one share, neighbours stay together, no share is larger than another by more than one."""
    shares = [list(range(n))[Group(rank, 3).share(n)] for rank in range(3)]
    assert [each for share in shares for each in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sum(Group(rank, 3).weight(len(share), n) for rank, share in enumerate(shares)) == pytest.approx(3)
