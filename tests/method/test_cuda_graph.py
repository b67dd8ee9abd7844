"""Steps as CUDA graphs: the same results as without, on a GPU; and what is done where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsu_ray.method import fit as fitting
from fsu_ray.method import invert as inversion
from fsu_ray.method.cuda_graph import WARM_UP, CudaGraphStep
from fsu_ray.method.fit import TrainingSchedule, fit
from fsu_ray.method.precision import repeatable
from fsu_ray.models.classifier import Classifier
from fsu_ray.recipes import InvertRecipe
from fsu_ray.records import ModelSpec

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SPEC = ModelSpec(arch="preactresnet18:4", channels=1, height=32, width=32, classes=10, mean=(0.1,), std=(0.28,))


def step_of(parameter: nn.Parameter, calls: list[int]) -> Callable[[Tensor], Tensor]:
    """The gradient of x * w is x; counts its calls."""

    def step(x: Tensor) -> Tensor:
        calls.append(len(x))
        loss = (x * parameter).sum()
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.parametrize("plain", [False, True])
def test_each_call_has_gradients_of_its_own(plain: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameter, calls = nn.Parameter(torch.full((), 2.0, device=device)), []
    replayed = CudaGraphStep(step_of(parameter, calls), [parameter], device, plain)
    for number in range(2 * WARM_UP + 4):
        x = torch.arange(2.0 + number % 2) + number  # two shapes in turn
        assert float(replayed(x)) == pytest.approx(2 * float(x.sum()))
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx(float(x.sum()))
    recorded = 0 if plain or device.type == "cpu" else 2
    assert replayed.recorded == recorded
    assert len(calls) == (2 * (WARM_UP + 1) if recorded else 2 * WARM_UP + 4)


@gpu
def test_a_step_that_cannot_be_recorded_is_called() -> None:
    parameter = nn.Parameter(torch.full((), 2.0, device="cuda"))

    def step(x: Tensor) -> Tensor:
        loss = (x * parameter).sum() * float(x.sum() > 0)  # waits for the GPU
        loss.backward()
        return loss.detach()

    replayed = CudaGraphStep(step, [parameter], torch.device("cuda"))
    for number in range(WARM_UP + 3):
        assert float(replayed(torch.full((3,), 1.0 + number))) == pytest.approx(6 * (1 + number))
        assert float(parameter.grad) == pytest.approx(3 * (1 + number))
    assert replayed.recorded == 0


@pytest.fixture
def repeats() -> Iterator[None]:
    repeatable()
    yield
    torch.use_deterministic_algorithms(False)


class Plain(CudaGraphStep):
    """Never recorded."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{**named, "plain": True})


def both(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """What `make` makes with steps recorded, and without."""
    seen: list[CudaGraphStep] = []

    class Seen(CudaGraphStep):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            seen.append(self)

    made = []
    for kind in (Seen, Plain):
        monkeypatch.setattr(fitting, "CudaGraphStep", kind)
        monkeypatch.setattr(inversion, "CudaGraphStep", kind)
        made.append(make())
    assert all(each.recorded for each in seen)
    return made[0], made[1]


def agree(one: nn.Module, other: nn.Module, most: float) -> None:
    for (name, x), y in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=most, atol=most, msg=lambda text, name=name: f"{name}: {text}")


@gpu
@pytest.mark.usefixtures("repeats")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_classifier_learns_the_same(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    pixels = torch.randint(0, 256, (330, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(330) % 10
    how = TrainingSchedule(epochs=4, batch=50, lr=0.01, frozen_statistics=frozen)

    def make() -> nn.Module:
        torch.manual_seed(0)
        classifier = Classifier(SPEC).cuda()
        fit(classifier, pixels, labels, how, as_they_are=torch.arange(330) < 100)
        return classifier

    agree(*both(monkeypatch, make), 1e-3)


@gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_inversion_ends_the_same(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    torch.manual_seed(0)
    classifier = Classifier(SPEC).cuda().eval()
    recipe = InvertRecipe(steps=8, batch=40, width=2, latent=8, precision=precision)
    heard: list[dict[str, float]] = []

    def make() -> nn.Module:
        run = inversion.begin(classifier, recipe)
        return inversion.invert(classifier, recipe, run, lambda step, steps, losses: heard.append(losses))

    agree(*both(monkeypatch, make), 1e-3 if precision == "float32" else 3e-2)
    first, second = heard
    assert first == pytest.approx(second, rel=0.02)
