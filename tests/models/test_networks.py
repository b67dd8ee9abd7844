"""Networks, the generator, the hooks, and weights that come from strangers."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from fsu_ray.errors import InvalidWeights, UnsupportedModel
from fsu_ray.models.architectures import batch_norms, build_network
from fsu_ray.models.classifier import Classifier
from fsu_ray.models.generator import Generator, UpsampledConv
from fsu_ray.models.hooks import affine_batch_norms, observe
from fsu_ray.records import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = [
    ("lenet5", 1, 32, 400),
    ("lenet5", 3, 28, 256),
    ("preactresnet18:4", 1, 32, 32),
    ("resnet50", 1, 16, 2048),
    ("resnet50", 3, 16, 2048),
    ("resnet50:4", 1, 32, 128),
    ("torchvision:resnet18", 3, 32, 512),
    ("torchvision:resnet18", 1, 32, 512),
    ("torchvision:mobilenet_v2", 3, 32, 1280),
]


def hooks_of(network: nn.Module) -> int:
    """Number of hooks anywhere in the network."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules())


@pytest.mark.parametrize(("inputs", "outputs", "rows", "columns"), [(3, 5, 4, 4), (1, 1, 1, 1), (4, 2, 3, 7)])
def test_upsampled_convolution_is_enlarge_then_convolve(inputs, outputs, rows, columns):
    """UpsampledConv and interpolate + conv2d are one function, with one gradient for input, weight and bias."""
    torch.manual_seed(1)
    layer = UpsampledConv(inputs, outputs).double()
    x = torch.randn(2, inputs, rows, columns, dtype=torch.float64, requires_grad=True)
    leaves = (x, layer.weight, layer.bias)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    built = layer(x)
    assert built.shape == (2, outputs, 2 * rows, 2 * columns)
    torch.testing.assert_close(built, plain)
    upstream = torch.randn_like(plain)
    for mine, reference in zip(
        torch.autograd.grad(built, leaves, upstream), torch.autograd.grad(plain, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def test_upsampled_convolution_has_the_state_of_a_plain_one():
    """The folding matrix is no weight: the state dict is that of a 3x3 convolution."""
    assert set(UpsampledConv(2, 3).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(("arch", "channels", "size", "features"), ARCHITECTURES)
def test_every_architecture_classifies_and_gives_its_features(spec, arch, channels, size, features):
    """Logits are (N, K), f_e is the input of the layer that the method sheet names, every BatchNorm is seen once."""
    network = Classifier(spec(arch, channels, size, 7)).eval()
    with torch.no_grad(), observe(network) as seen:
        logits = network(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert seen.features is not None
    assert seen.features.shape == (2, features)
    assert len(seen.statistics) == len(batch_norms(network)) > 0
    for mean, variance, kept_mean, kept_variance in seen.statistics:
        assert mean.shape == variance.shape == kept_mean.shape == kept_variance.shape
    assert hooks_of(network) == 0


def test_features_are_the_input_of_the_last_linear_layer(classifier):
    """PreActResNet: the last layer applied to f_e gives the logits. LeNet5: f_e goes through fc1, fc2 and fc3."""
    deep, small = classifier("preactresnet18:2"), classifier("lenet5")
    pixels = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        with observe(deep) as seen:
            logits = deep(pixels)
        torch.testing.assert_close(deep.network.linear(seen.features), logits)
        with observe(small) as seen:
            logits = small(pixels)
        net = small.network
        torch.testing.assert_close(net.fc3(F.relu(net.fc2(F.relu(net.fc1(seen.features))))), logits)


def test_statistics_are_mean_and_biased_variance_of_the_input(spec):
    """The first BatchNorm of LeNet5 sees the normalised pixels; its statistics agree with sums over (N, H, W)."""
    network = Classifier(spec(channels=2, mean=(0.1, 0.4), std=(0.3, 0.5))).eval()
    network.network.bn1.running_mean.fill_(0.7)
    pixels = torch.rand(5, 2, 16, 16)
    with torch.no_grad(), observe(network) as seen:
        network(pixels)
    x = (pixels - torch.tensor([0.1, 0.4]).view(1, 2, 1, 1)) / torch.tensor([0.3, 0.5]).view(1, 2, 1, 1)
    count = 5 * 16 * 16
    mean = x.sum((0, 2, 3)) / count
    variance = ((x - mean.view(1, 2, 1, 1)) ** 2).sum((0, 2, 3)) / count
    torch.testing.assert_close(seen.statistics[0][0], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.statistics[0][1], variance, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.statistics[0][2], torch.full((2,), 0.7))
    assert torch.equal(seen.statistics[0][3], torch.ones(2))


def test_first_limits_the_statistics_and_not_the_features(classifier):
    """With `first` = 4 the statistics are those of the first four samples alone, in every layer."""
    network, pixels = classifier().eval(), torch.rand(10, 1, 16, 16)
    with torch.no_grad():
        with observe(network, statistics=False) as limited, affine_batch_norms(network, limited, 4):
            network(pixels)
        with observe(network) as alone:
            network(pixels[:4])
    assert len(limited.features) == 10
    for some, reference in zip(limited.statistics, alone.statistics, strict=True):
        torch.testing.assert_close(some[0], reference[0])
        torch.testing.assert_close(some[1], reference[1])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.BatchNorm1d(3)])
def test_the_gradient_of_the_statistics_is_that_of_their_definition(layer, dtype, most):
    """Of the first samples alone, in both memory formats; the others have none."""
    torch.manual_seed(0)
    network = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2)).eval()
    for memory in (torch.contiguous_format, torch.channels_last):
        x = 2 * torch.randn((7, 3, 4, 5) if isinstance(layer, nn.BatchNorm2d) else (7, 3)) + 1
        x = x.to(dtype).to(memory_format=memory) if x.dim() == 4 else x.to(dtype)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            observe(network, statistics=False) as seen,
            affine_batch_norms(network, seen, 4),
        ):
            network(one)
        mean, variance, *_ = seen.statistics[0]
        part = other[:4].float()
        axes = [0, *range(2, x.dim())]
        expected = torch.var_mean(part, dim=axes, correction=0)
        torch.testing.assert_close((variance, mean), expected, rtol=1e-4, atol=1e-4)
        wanted = (mean - 0.3).square().sum() + variance.sqrt().sum(), (expected[1] - 0.3).square().sum()
        (gradient,) = torch.autograd.grad(wanted[0], one)
        (reference,) = torch.autograd.grad(wanted[1] + expected[0].sqrt().sum(), other)
        torch.testing.assert_close(gradient, reference, rtol=most, atol=most)
        assert not gradient[4:].any()


def test_statistics_can_be_left_out(classifier):
    """`statistics=False` watches the features alone."""
    network = classifier()
    with torch.no_grad(), observe(network, statistics=False) as seen:
        network(torch.rand(2, 1, 16, 16))
    assert seen.statistics == []
    assert seen.features is not None


@pytest.mark.parametrize("arch", ["lenet5", "preactresnet18:2"])
def test_hooks_are_gone_after_an_error(classifier, arch):
    """An exception inside the block leaves no hook behind, and is not swallowed."""
    network = classifier(arch)
    with pytest.raises(RuntimeError), observe(network):
        network(torch.rand(2, 5, 16, 16))  # five channels: the network itself breaks
    assert hooks_of(network) == 0
    with pytest.raises(KeyError), observe(network):
        raise KeyError
    assert hooks_of(network) == 0
    with observe(network):
        assert hooks_of(network) > 0
    assert hooks_of(network) == 0


@pytest.mark.parametrize(
    ("rows", "columns", "channels"), [(8, 8, 1), (12, 20, 2), (28, 28, 1), (32, 32, 3), (64, 36, 4)]
)
@pytest.mark.parametrize("training", [True, False])
def test_generator_draws_any_size_that_is_a_multiple_of_four(rows, columns, channels, training):
    """Pixels lie in [0, 1] at the size and channels of the spec, in both modes."""
    spec = ModelSpec(arch="lenet5", channels=channels, height=rows, width=columns, classes=4)
    generator = Generator(spec, width=2, latent=5).train(training)
    pixels = generator(10 * torch.randn(4, 5), torch.arange(4)).detach()
    assert pixels.shape == (4, channels, rows, columns)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1


def test_generator_is_conditioned_on_the_class(spec):
    """The same z gives different pixels for different classes."""
    torch.manual_seed(0)
    generator = Generator(spec(), width=2, latent=5).eval()
    z = torch.randn(1, 5).expand(3, 5)
    pixels = generator(z, torch.arange(3))
    assert float((pixels[0] - pixels[1]).abs().max().detach()) > 1e-4


@pytest.mark.parametrize("arch", ["lenet5", "preactresnet18:2", "torchvision:mobilenet_v2"])
def test_weights_make_the_round_trip_byte_for_byte(classifier, arch):
    """to_bytes(from_bytes(x)) == x, whatever the memory format, and the logits are the same."""
    first = classifier(arch, channels=3, size=32)
    data = first.to_bytes()
    again = Classifier.from_bytes(first.spec, data)
    assert again.to_bytes() == data
    assert not again.training
    assert again.to(memory_format=torch.channels_last).to_bytes() == data
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(first(pixels), again(pixels))


def damaged(kind: str, spec: ModelSpec) -> bytes:
    """Weights with one fault."""
    network = Classifier(spec)
    data = network.to_bytes()
    tensors = load_tensors(data)
    if kind == "truncated":
        return data[:-10]
    if kind == "header cut short":
        return data[:20]
    if kind == "empty":
        return b""
    if kind == "text":
        return b"these are no weights\nat all\n"
    if kind == "missing":
        del tensors["fc1.bias"]
    elif kind == "surplus":
        tensors["other"] = torch.zeros(1)
    elif kind == "shape":
        tensors["fc3.weight"] = torch.zeros(4, 84)
    elif kind == "nan":
        tensors["conv1.weight"][0, 0, 0, 0] = torch.nan
    elif kind == "infinite":
        tensors["bn1.running_var"][0] = torch.inf
    return save_tensors(tensors)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", "whole safetensors"),
        ("header cut short", "whole safetensors"),
        ("empty", "whole safetensors"),
        ("text", "whole safetensors"),
        ("missing", "fc1.bias"),
        ("surplus", "'other'"),
        ("shape", "fc3.weight"),
        ("nan", "conv1.weight"),
        ("infinite", "bn1.running_var"),
    ],
)
def test_bad_weights_are_refused_in_one_line(spec, kind, says):
    """Each fault gives InvalidWeights, one line that names it."""
    with pytest.raises(InvalidWeights, match=says) as caught:
        Classifier.from_bytes(spec(), damaged(kind, spec()))
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "oldest pickle"])
def test_a_pickle_is_refused_and_never_unpickled(spec, tmp_path, form):
    """torch.save's formats and plain pickles end in InvalidWeights, and no code in them runs."""
    sprung = tmp_path / "sprung"
    sink = io.BytesIO()
    if "pickle" in form:
        pickle.dump(Trap(str(sprung)), sink, protocol=0 if form == "oldest pickle" else None)
    else:
        torch.save({"w": Trap(str(sprung))}, sink, _use_new_zipfile_serialization=form == "zip")
    says = "whole safetensors" if form == "oldest pickle" else "pickle .torch.save."
    with pytest.raises(InvalidWeights, match=says) as caught:
        Classifier.from_bytes(spec(), sink.getvalue())
    assert "\n" not in str(caught.value)
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["alexnet", "vgg11"])
def test_a_network_without_batch_norm_is_unsupported(spec, name, monkeypatch):
    """The inversion needs BatchNorm, and the error says so."""
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda w, *_, **__: w)  # 130 M random numbers are not the point
    monkeypatch.setattr(nn.init, "normal_", lambda w, *_, **__: w)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda w, *_, **__: w)
    with pytest.raises(UnsupportedModel, match="BatchNorm") as caught:
        build_network(spec(f"torchvision:{name}", 3, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arch",
    ["lenet", "lenet5:3", "preactresnet18:0", "preactresnet18:x", "resnet50:0", "torchvision:", "torchvision:nope"],
)
def test_an_unknown_architecture_is_unsupported(spec, arch):
    """Every other name ends in UnsupportedModel, one line."""
    with pytest.raises(UnsupportedModel) as caught:
        build_network(spec(arch, 3, 32))
    assert "\n" not in str(caught.value)


def test_resnet50_is_torchvisions_behind_a_small_stem(spec):
    """The same names, shapes and function as torchvision's network with a 3x3 stem and no first pooling."""
    ours = build_network(spec("resnet50", 3, 16)).eval()
    theirs = torchvision.models.resnet50(num_classes=ours.fc.out_features).eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_lenet5_refuses_images_that_leave_no_pixel(spec):
    """At 16x16 one pixel is left before fc1; below that there is none."""
    assert build_network(spec(size=16)).fc1.in_features == 16
    with pytest.raises(UnsupportedModel, match="16x16"):
        build_network(spec(size=12))


@pytest.mark.parametrize("name", ["preactresnet18:2", "torchvision:resnet18"])
def test_affine_batch_norms_are_the_same_function(name):
    """Same output, gradient and statistics; layers are themselves again, after an error too; none in train mode."""
    spec = ModelSpec(arch=name, channels=3, height=32, width=32, classes=4)
    network = Classifier(spec)
    for layer in batch_norms(network):
        torch.nn.init.normal_(layer.weight, 1, 0.3)
        torch.nn.init.normal_(layer.bias)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    network.eval().requires_grad_(False)
    found = []
    for affine in (False, True):
        pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if affine:
            with observe(network, statistics=False) as seen, affine_batch_norms(network, seen, 3):
                logits = network(pixels)
        else:
            logits = network(pixels)
            with observe(network) as seen:
                network(pixels[:3])
        far = torch.stack([(layer[0] - layer[2]).norm() + (layer[1] - layer[3]).norm() for layer in seen.statistics])
        (logits.square().sum() + far.sum()).backward()
        found.append((logits, pixels.grad, *(part for layer in seen.statistics for part in layer)))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-3 * float(plain.detach().abs().max()))
    with pytest.raises(RuntimeError), affine_batch_norms(network, seen, 3):
        network(torch.rand(4, 1, 32, 32))
    assert not any("forward" in layer.__dict__ for layer in batch_norms(network))
    with affine_batch_norms(network.train(), seen, 3):
        assert not any("forward" in layer.__dict__ for layer in batch_norms(network))
