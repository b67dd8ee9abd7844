"""Training steps as CUDA graphs.

On a GPU a step of these networks is hundreds of kernels of a few microseconds each; launching them takes longer than
running them. A step that is recorded once and replayed as a whole takes only the time that the GPU needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Plain calls before one is recorded, in which libraries initialise themselves."""


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    out: Tensor
    gradients: list[Tensor | None]


class CudaGraphStep:
    """Calls `step(*inputs) -> Tensor`, which leaves gradients in `parameters`; on a GPU it is recorded and replayed.

    A call takes tensors of any device and clears the gradients first. On a GPU each shape of the inputs is recorded at
    its fourth call. From then on no Python code of `step` runs, so it must do the same to the same tensors each time. A
    step that cannot be recorded is called plainly. With `plain` nothing is recorded.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        plain: bool = False,
    ) -> None:
        self._step, self._parameters, self._device = step, list(parameters), device
        self._plain = plain or device.type != "cuda"
        self._calls: Counter[tuple[torch.Size, ...]] = Counter()
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}

    @property
    def recorded(self) -> int:
        """The number of input shapes that are replayed."""
        return len(self._recorded)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result of `step` for `inputs`."""
        if self._plain:
            return self._call(inputs)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._recorded:
            self._calls[shapes] += 1
            if self._calls[shapes] <= WARM_UP:
                return self._beside(inputs)
            try:
                self._recorded[shapes] = self._record(inputs)
            except RuntimeError:  # it waits for the GPU somewhere, or makes a tensor from numbers
                torch.cuda.synchronize()
                self._plain = True
                return self._call(inputs)
        recorded = self._recorded[shapes]
        for buffer, x in zip(recorded.inputs, inputs, strict=True):
            buffer.copy_(x)
        recorded.graph.replay()
        for parameter, gradient in zip(self._parameters, recorded.gradients, strict=True):
            parameter.grad = gradient
        return recorded.out.clone()

    def _call(self, inputs: Iterable[Tensor]) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        return self._step(*(x.to(self._device) for x in inputs))

    def _beside(self, inputs: Iterable[Tensor]) -> Tensor:
        """Call the step on a stream of its own, as recording does."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = self._call(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return out

    def _record(self, inputs: Iterable[Tensor]) -> _Recorded:
        own = [x.to(self._device, copy=True) for x in inputs]
        for parameter in self._parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._step(*own)
        return _Recorded(graph, own, out, [parameter.grad for parameter in self._parameters])
