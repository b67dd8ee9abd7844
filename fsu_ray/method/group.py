"""The processes that share a run: the parts of a batch, and sums over all processes.

All ranks run the same code in step (SPMD) and come to the same results. A batch is that of the whole group, cut into
shares by the global index of its samples. A mean over the batch (a loss, the statistics of a BatchNorm layer) is taken
over the whole batch. A group of one needs no process group.

There are two kinds of losses. A loss over the samples of a share is weighted by `weight`. A loss over the whole batch
(through `total` or `gather`) is the same number on every rank. In both cases the mean over ranks of the gradients,
which DistributedDataParallel takes, is the gradient of the loss of the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsu_ray.errors import FsuError, RunFailed

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """The group of torch's default process group; a group of one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, n: int) -> slice:
        """The part of `n` samples that this rank has: neighbours, in shares as even as possible."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def weight(self, own: int, n: int) -> float:
        """The weight of the mean over this rank's `own` samples such that the mean over ranks is that over all `n`."""
        return self.size * own / n

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, with its gradient."""
        if self.size == 1:
            return x
        out: Tensor = _Total.apply(x)
        return out

    def gather(self, x: Tensor, n: int) -> Tensor:
        """The rows of all ranks, (n, ...), with their gradient: `x` holds those of `share(n)`."""
        if self.size == 1:
            return x
        before, after = self.share(n).start, n - self.share(n).stop
        return self.total(torch.nn.functional.pad(x, (*[0, 0] * (x.dim() - 1), before, after)))

    def everyone(self, mine: T) -> list[T]:
        """The value `mine` of each rank, by rank."""
        values: list[Any] = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(values, mine)
        return values

    def once(self, act: Callable[[], T]) -> T:
        """The result of `act` on the first rank, sent to all ranks. An error is raised on all ranks."""
        if self.size == 1:
            return act()
        answer: list[Any] = [_attempt(act) if self.rank == 0 else None]
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        return _result(answer[0])  # type: ignore[no-any-return]

    def together(self, act: Callable[[], T]) -> T:
        """The result of `act`, which every rank calls for itself. An error of one rank is raised on all."""
        if self.size == 1:
            return act()
        mine = _attempt(act)
        for _, error in self.everyone((None, mine[1])):
            _result((None, error))
        return mine[0]  # type: ignore[no-any-return]

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` such that a backward pass leaves the mean over ranks in its gradients."""
        if self.size == 1:
            return module
        # A static graph: some networks have parameters that this use of them never reaches.
        return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False, static_graph=True)

    def synchronise(self, module: nn.Module) -> None:
        """Have every BatchNorm layer below `module`, in train mode, normalise by the statistics of the whole batch."""
        if self.size > 1:
            for layer in [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]:
                layer.forward = functools.partial(_normalised, layer, self)  # type: ignore[method-assign]

    def pool(
        self, moments: list[tuple[Tensor, Tensor, Tensor]], own: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The number of samples in the whole batch, and the mean and biased variance, (C,) each, of every layer.

        All layers take one sum over the ranks.

        `moments` of this rank's share of `own` samples: mean, variance, and a point near the mean that all ranks agree
        on, which keeps the difference of squares from cancelling.
        """
        if self.size == 1:
            return moments[0][0].new_full((), own), [(mean, variance) for mean, variance, _ in moments]
        parts = [moments[0][0].new_tensor([float(own)])]
        for mean, variance, near in moments:
            parts += [own * (mean - near), own * (variance + (mean - near).square())]
        count, *sums = torch.split(self.total(torch.cat(parts)), [len(part) for part in parts])
        pooled = []
        for (_, _, near), first, second in zip(moments, sums[::2], sums[1::2], strict=True):
            shift = first / count
            pooled.append((near + shift, (second / count - shift.square()).clamp(min=0)))
        return count, pooled


class _Total(torch.autograd.Function):
    """The sum over all ranks. Backwards too: what every rank does with the sum depends on this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = grad.contiguous().clone()
        dist.all_reduce(out)
        return out


def _normalised(layer: nn.BatchNorm2d, group: Group, x: Tensor) -> Tensor:
    """BatchNorm of x (N, C, H, W), a share of a batch, as BatchNorm of the whole batch would do it."""
    if not layer.training:
        return nn.BatchNorm2d.forward(layer, x)
    mean, variance, weight, bias = layer.running_mean, layer.running_var, layer.weight, layer.bias
    assert mean is not None is not variance
    assert layer.momentum is not None
    values = x.float()
    own = values.numel() // values.shape[1]
    var, average = torch.var_mean(values, dim=(0, 2, 3), correction=0)
    count, ((average, var),) = group.pool([(average, var, mean.clone())], own)
    with torch.no_grad():
        mean.lerp_(average, layer.momentum)
        variance.lerp_(var * count / (count - 1), layer.momentum)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
    scale = weight * torch.rsqrt(var + layer.eps)
    shape = (1, -1, 1, 1)
    return ((values - average.view(shape)) * scale.view(shape) + bias.view(shape)).to(x.dtype)


def _attempt(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return act(), None
    except FsuError as error:
        return None, error
    except Exception as error:  # whatever it is, the other ranks must not wait for ever
        return None, RunFailed(f"{type(error).__name__}: {error}")


def _result(answer: tuple[Any, Exception | None]) -> Any:
    value, error = answer
    if error is not None:
        if isinstance(error, FsuError):
            error.agreed = True
        raise error
    return value
