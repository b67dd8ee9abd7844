"""Augmentation: directions and distances by exact cases, gradients, and the seeds of its draws."""

from __future__ import annotations

import pytest
import torch

from fsu_ray.method.augment import ROTATION, SHIFT, random_view, rotated, seeded, transform


def images(n: int = 3, channels: int = 2, rows: int = 8, columns: int = 8) -> torch.Tensor:
    """Noise in [0, 1]."""
    return torch.rand((n, channels, rows, columns), generator=torch.Generator().manual_seed(5))


def still(n: int = 3) -> torch.Tensor:
    """No shift."""
    return torch.zeros(n, 2)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 12), (20, 12)])
def test_nothing_asked_nothing_done(rows, columns):
    """0 degrees, no shift, no flip: the identity, on square and other images."""
    x = images(rows=rows, columns=columns)
    close(transform(x, torch.zeros(3), still()), x)
    close(transform(x, torch.zeros(3), still(), torch.zeros(3, dtype=torch.bool)), x)
    close(rotated(x, 0.0), x)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns_go_anticlockwise_as_rot90_does(quarters):
    """90 degrees are torch.rot90 once, from rows to columns: anticlockwise as an image is shown."""
    x = images()
    close(transform(x, torch.full((3,), 90.0 * quarters), still()), torch.rot90(x, quarters, (2, 3)))


def test_a_small_positive_angle_lifts_the_right_end_of_a_bar():
    """+15 degrees turn a horizontal bar so that its right end goes up."""
    x = torch.zeros(1, 1, 33, 33)
    x[..., 16, 2:31] = 1
    turned = rotated(x, 15.0)[0, 0]
    rows = torch.arange(33.0)
    centre = (turned * rows[:, None]).sum(0) / turned.sum(0).clamp(min=1e-6)  # mean row of each column
    assert centre[26] < 15 < 17 < centre[6]


@pytest.mark.parametrize(("right", "down"), [(1, 0), (-2, 0), (0, 3), (2, -1), (0, 0)])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 16)])
def test_a_shift_by_whole_pixels_moves_and_brings_in_zeros(right, down, rows, columns):
    """Shifts are shares of width and height, to the right and down; what comes in is black."""
    x = images(rows=rows, columns=columns) + 0.1
    moved = transform(x, torch.zeros(3), torch.tensor([right / columns, down / rows]).expand(3, 2))
    expected = torch.zeros_like(x)
    inside = slice(max(down, 0), rows + min(down, 0)), slice(max(right, 0), columns + min(right, 0))
    source = slice(max(-down, 0), rows + min(-down, 0)), slice(max(-right, 0), columns + min(-right, 0))
    expected[:, :, inside[0], inside[1]] = x[:, :, source[0], source[1]]
    close(moved, expected)


@pytest.mark.parametrize("columns", [8, 12])
def test_flip_mirrors_left_and_right_of_the_chosen_samples_alone(columns):
    """flip is a mask over samples."""
    x = images(columns=columns)
    out = transform(x, torch.zeros(3), still(), torch.tensor([True, False, True]))
    close(out[0], x[0].flip(-1))
    close(out[1], x[1])
    close(out[2], x[2].flip(-1))


def test_a_sample_is_turned_and_then_mirrored():
    """Turn anticlockwise, then mirror: the order in which the docstring names them."""
    x = images()
    out = transform(x, torch.full((3,), 90.0), still(), torch.ones(3, dtype=torch.bool))
    close(out, torch.rot90(x, 1, (2, 3)).flip(-1))


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (20, 8)])
def test_images_that_are_not_square_turn_without_distortion(rows, columns):
    """180 degrees are both flips, and 90 degrees are rot90 in the square that both share."""
    x = images(rows=rows, columns=columns)
    close(rotated(x, 180.0), x.flip(-1, -2))
    side = min(rows, columns)
    top, left = (rows - side) // 2, (columns - side) // 2
    middle = x[:, :, top : top + side, left : left + side]
    close(rotated(x, 90.0)[:, :, top : top + side, left : left + side], torch.rot90(middle, 1, (2, 3)))
    outside = rotated(torch.ones_like(x), 90.0)
    assert float(outside.sum()) == pytest.approx(3 * 2 * side * side, rel=1e-4)  # the ends are zeros


def test_every_sample_has_its_own_transformation():
    """The batch is the same as its samples one by one."""
    x = images()
    degrees, shift = torch.tensor([10.0, -5.0, 90.0]), torch.tensor([[0.1, 0.0], [0.0, -0.1], [0.05, 0.05]])
    flip = torch.tensor([True, False, False])
    out = transform(x, degrees, shift, flip)
    for i in range(3):
        one = slice(i, i + 1)
        close(out[one], transform(x[one], degrees[one], shift[one], flip[one]))
    views = random_view(x[:1].expand(3, -1, -1, -1), seeded(1))
    assert not torch.allclose(views[0], views[1], atol=1e-3)


def test_the_gradient_reaches_the_pixels():
    """The view is linear in the pixels, so the gradient agrees with finite differences."""
    x = images(2, 1, 4, 4).double().requires_grad_()
    degrees, shift = torch.tensor([10.0, -12.0]).double(), torch.tensor([[0.05, 0.0], [0.0, -0.06]]).double()
    flip = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda p: transform(p, degrees, shift, flip.double()), (x,))
    y = images().requires_grad_()
    random_view(y, seeded(0)).sum().backward()
    assert y.grad is not None
    assert float(y.grad.abs().min()) >= 0
    assert float(y.grad[:, :, 3:5, 3:5].min()) > 0.5  # every pixel in the middle is seen


def test_random_views_stay_within_their_bounds():
    """Up to 15 degrees and 1/16 of the size: what lies within 9 pixels of the centre of 32 is never lost."""
    assert (ROTATION, SHIFT) == (15.0, 1 / 16)
    x = torch.zeros(200, 1, 32, 32)
    x[..., 12:20, 12:20] = 1
    seen = random_view(x, seeded(3), flip=True)
    assert float(seen[..., :6, :].sum() + seen[..., 26:, :].sum()) == 0
    assert float((seen.sum((1, 2, 3)) - 64).abs().max()) < 3
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1 + 1e-6
    columns = (seen.sum((1, 2)) * torch.arange(32.0)).sum(1) / seen.sum((1, 2, 3)) - 15.5
    assert float(columns.abs().max()) < 2.5  # 2 pixels each way, turned by 15 degrees
    assert float(columns.min()) < -1.5 < 1.5 < float(columns.max())


def test_flips_come_only_when_asked_and_half_the_time():
    """A view of a lopsided image is mirrored never without `flip`, and about half the time with it."""
    x = torch.zeros(400, 1, 32, 32)
    x[..., 4:28, 4:10] = 1
    for flip, low, high in ((False, 0.0, 0.0), (True, 0.4, 0.6)):
        seen = random_view(x, seeded(9), flip)
        mirrored = seen[..., 16:].sum((1, 2, 3)) > seen[..., :16].sum((1, 2, 3))
        assert low <= float(mirrored.float().mean()) <= high


def test_the_same_parts_give_the_same_stream():
    """seeded is a function of its parts, and leaves torch's own stream alone."""
    before = torch.random.get_rng_state()
    assert torch.equal(torch.rand(9, generator=seeded(3, 4)), torch.rand(9, generator=seeded(3, 4)))
    x = images()
    assert torch.equal(random_view(x, seeded(1, 2), True), random_view(x, seeded(1, 2), True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_different_parts_give_different_streams():
    """Order, number and value of the parts all count."""
    parts = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (2**40, 3)]
    parts += [(7, i) for i in range(200)]
    firsts = {tuple(torch.rand(4, generator=seeded(*p)).tolist()) for p in parts}
    assert len(firsts) == len(parts)
