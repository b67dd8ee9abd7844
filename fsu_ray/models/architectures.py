"""The architectures: what network a `ModelSpec` names."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fsu_ray.errors import UnsupportedModel
from fsu_ray.records import ModelSpec


class LeNet5(nn.Module):
    """LeNet5 with a BatchNorm before each convolution (appendix D.1), for any input size from 16 on."""

    feature_layer = "fc1"  # f_e: the flattened output of the last convolution, 400-d at 32x32

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        rows, columns = ((size - 4) // 2 for size in (spec.height, spec.width))
        rows, columns = ((size - 4) // 2 for size in (rows, columns))
        if min(rows, columns) < 1:
            raise UnsupportedModel(f"lenet5 needs at least 16x16 pixels, the model has {spec.height}x{spec.width}")
        self.bn1 = nn.BatchNorm2d(spec.channels)
        self.conv1 = nn.Conv2d(spec.channels, 6, 5)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * rows * columns, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(self.bn1(x))), 2)  # (N, 6, 14, 14) at 32x32
        x = F.max_pool2d(F.relu(self.conv2(self.bn2(x))), 2)  # (N, 16, 5, 5)
        x = F.relu(self.fc1(x.flatten(1)))
        out: Tensor = self.fc3(F.relu(self.fc2(x)))
        return out


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind BatchNorm and ReLU (He et al. 2016, identity mappings)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        fits = stride == 1 and inputs == outputs
        self.shortcut = None if fits else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return out + skip


class PreActResNet18(nn.Module):
    """PreActResNet-18 for small images; `width` channels in the first stage (64 in the paper).

    As in the usual CIFAR form of this network, no BatchNorm stands before the pooling: f_e is the
    pooled vector of 8 * width dimensions, the input of the last layer.
    """

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(spec.channels, width, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width << stage
            blocks += [PreActBlock(inputs, outputs, 2 if stage else 1), PreActBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv1(x))
        out: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def _torchvision(name: str, spec: ModelSpec) -> nn.Module:
    """A torchvision classification model by name, its first convolution fitted to the channels."""
    import torchvision.models as zoo

    if name not in zoo.list_models(module=zoo):
        raise UnsupportedModel(
            f"torchvision has no classification model {name!r}; see torchvision.models.list_models()"
        )
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = zoo.get_model(name, weights=None, num_classes=spec.classes, **extra)
    if spec.channels != 3:
        _refit_first_convolution(network, spec.channels)
    return network


def _refit_first_convolution(network: nn.Module, channels: int) -> None:
    """Replace the first convolution by one for `channels`."""
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            kernel: Any = module.kernel_size
            stride: Any = module.stride
            padding: Any = module.padding
            conv = nn.Conv2d(channels, module.out_channels, kernel, stride, padding, bias=module.bias is not None)
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, conv)
            return
    raise UnsupportedModel("the network has no convolution to fit to the number of channels")


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2015) for small images: a 3x3 stem of stride 1, no first pooling; torchvision's names.

    `width` channels in the first stage's 3x3 convolutions (64 in the paper); f_e has 32 * width dimensions.
    """

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(spec.channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, inputs = _bottlenecks(width, width, 3, 1)
        self.layer2, inputs = _bottlenecks(inputs, 2 * width, 4, 2)
        self.layer3, inputs = _bottlenecks(inputs, 4 * width, 6, 2)
        self.layer4, inputs = _bottlenecks(inputs, 8 * width, 3, 2)
        self.fc = nn.Linear(inputs, spec.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def _bottlenecks(inputs: int, planes: int, blocks: int, stride: int) -> tuple[nn.Sequential, int]:
    """A stage of ResNet-50 and the number of channels that it ends in."""
    from torchvision.models.resnet import Bottleneck

    outputs = planes * Bottleneck.expansion
    skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = Bottleneck(inputs, planes, stride, skip)
    return nn.Sequential(first, *(Bottleneck(outputs, planes) for _ in range(blocks - 1))), outputs


def build_network(spec: ModelSpec) -> nn.Module:
    """The network that `spec.arch` names, freshly initialised from torch's current seed.

    `lenet5`, `preactresnet18` or `preactresnet18:WIDTH`, `resnet50` or `resnet50:WIDTH` (64 without,
    both fitted to small images), `torchvision:NAME`. Raises UnsupportedModel for any other name, and
    for a network without BatchNorm, whose statistics eq. 6 needs.
    """
    name, _, option = spec.arch.partition(":")
    width = int(option) if option.isdecimal() else 0 if option else 64
    if name == "lenet5" and not option:
        network: nn.Module = LeNet5(spec)
    elif name == "preactresnet18" and width:
        network = PreActResNet18(spec, width)
    elif name == "resnet50" and width:
        network = ResNet50(spec, width)
    elif name == "torchvision" and option:
        network = _torchvision(option, spec)
    else:
        raise UnsupportedModel(
            f"unknown architecture {spec.arch!r}: use lenet5, preactresnet18[:WIDTH], resnet50[:WIDTH] or "
            "torchvision:NAME"
        )
    if not batch_norms(network):
        raise UnsupportedModel(
            f"{spec.arch} has no BatchNorm layer: the inversion reads the training data's statistics from BatchNorm "
            "(eq. 6), so only networks with BatchNorm can be registered"
        )
    return network


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm layer that keeps running statistics, in the order of the module tree."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in network.modules() if isinstance(m, kinds) and m.running_mean is not None]
