import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as reference

from sparsereg.data import augment
from sparsereg.data.augment import Augmentation, crop_boxes, resample, resample_masks
from sparsereg.errors import InputError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(num=64, shape=(3, 32, 32)):
    return torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=generator(1))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 40)])
def test_crop_and_flip_equal_torchvision(shape):
    batch = images(shape=shape)
    rows = Augmentation(flip=True, crop_scale=(0.3, 1.0), crop_ratio=(0.5, 2.0)).draw(
        64, *shape[1:], generator()
    )
    expected = []
    for image, row in zip(batch, rows, strict=True):
        top, left, height, width = (int(v) for v in row[:4])
        crop = reference.resized_crop(
            image.float(), top, left, height, width, list(shape[1:]), antialias=True
        )
        expected.append(reference.hflip(crop) if row[augment.FLIP] else crop)
    torch.testing.assert_close(resample(batch, rows), torch.stack(expected), rtol=0, atol=2e-2)
    assert 10 < rows[:, augment.FLIP].sum() < 54


def test_affine_equals_torchvision():
    batch = images(shape=(1, 28, 28))
    rows = Augmentation(degrees=30, translate=3, zoom=0.2).draw(64, 28, 28, generator())
    # Without a fill value torchvision takes what lies outside as black, as we do.
    expected = torch.stack(
        [
            reference.affine(
                image.float(),
                angle=math.degrees(row[augment.ANGLE]),
                translate=[float(row[augment.RIGHT]), float(row[augment.DOWN])],
                scale=float(row[augment.ZOOM]),
                shear=[0.0],
                interpolation=InterpolationMode.BILINEAR,
            )
            for image, row in zip(batch, rows, strict=True)
        ]
    )
    torch.testing.assert_close(resample(batch, rows, affine=True), expected, rtol=0, atol=2e-2)
    limits = {augment.ANGLE: math.radians(30), augment.RIGHT: 3.0, augment.DOWN: 3.0}
    for column, limit in limits.items():
        assert 0.8 * limit < rows[:, column].abs().max() <= limit
    assert 0.8 <= rows[:, augment.ZOOM].min() < 0.85
    assert 1.15 < rows[:, augment.ZOOM].max() <= 1.2


def test_rows_without_a_change_leave_images_as_they_are():
    batch = images()
    nothing = Augmentation()
    rows = nothing.draw(64, 32, 32, generator())
    assert nothing.identity
    for affine in (False, True):
        torch.testing.assert_close(resample(batch, rows, affine), batch.float(), rtol=0, atol=2e-2)


def test_affine_with_a_crop_shows_the_crop_and_black():
    white = torch.full((200, 1, 16, 16), 255, dtype=torch.uint8)
    settings = Augmentation(crop_scale=(0.5, 0.8), degrees=20, translate=4)
    out = resample(white, settings.draw(200, 16, 16, generator()), affine=True)
    assert out.min() == 0
    assert out.max() == pytest.approx(255, abs=1e-3)


@pytest.mark.parametrize(("size", "scale", "ratio"), [
    ((32, 32), (0.8, 1.0), (0.9, 1.1)),
    ((20, 48), (0.08, 1.0), (3 / 4, 4 / 3)),
])  # fmt: skip
def test_crop_boxes_follow_the_law_of_torchvision(size, scale, ratio):
    num = 4000
    u = torch.rand(num, 22, generator=generator())
    ours = crop_boxes(u[:, 2:].view(num, 10, 2), u[:, :2], *size, scale, ratio)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = torch.empty(1, *size)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(num)]
        )
    top, left, height, width = ours.T
    assert ((top >= 0) & (left >= 0) & (top + height <= size[0]) & (left + width <= size[1])).all()
    assert torch.equal(ours, ours.round())
    # Two samples of one law: means within 4.5 standard errors of their difference.
    spread = (ours.var(0) + theirs.float().var(0)).div(num).sqrt()
    assert ((ours.mean(0) - theirs.float().mean(0)).abs() <= 4.5 * spread).all()


def test_crop_boxes_fall_back_to_the_largest_box_with_the_ratio():
    never = torch.ones(2, 10, 2)
    for height, width, expected in ((8, 32, [0, 11, 8, 9]), (32, 8, [11, 0, 9, 8])):
        boxes = crop_boxes(never, torch.rand(2, 2), height, width, (1.0, 1.0), (0.9, 1.1))
        assert boxes.tolist() == [[float(v) for v in expected]] * 2


def test_switches_do_not_disturb_each_other():
    def draw(**settings):
        return Augmentation(**settings).draw(32, 32, 32, generator(5))

    everything = draw(flip=True, crop_scale=(0.8, 1.0), degrees=5, translate=1, zoom=0.1)
    assert torch.equal(everything[:, :4], draw(crop_scale=(0.8, 1.0))[:, :4])
    assert torch.equal(everything[:, augment.FLIP], draw(flip=True)[:, augment.FLIP])
    assert torch.equal(everything[:, augment.ANGLE], draw(degrees=5)[:, augment.ANGLE])


@pytest.mark.parametrize("settings", [
    {"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.8, 1.2)}, {"crop_scale": (0.9, 0.8)},
    {"crop_scale": (0.8,)}, {"crop_ratio": (-1.0, 1.0)}, {"crop_ratio": (1.0, math.inf)},
    {"degrees": -1}, {"degrees": 181}, {"translate": -0.5}, {"translate": math.inf}, {"zoom": 1.0},
    {"zoom": math.nan}, {"elastic": -1.0}, {"elastic": math.inf}, {"elastic_smoothness": 0.0},
])  # fmt: skip
def test_wrong_settings(settings):
    (name,) = settings
    with pytest.raises(InputError, match=f"^{name}="):
        Augmentation(**settings)


def test_whole_pixels_move_images_without_blurring_them():
    images = torch.randint(0, 256, (512, 1, 12, 12), generator=generator(), dtype=torch.uint8)
    settings = Augmentation(translate=2, whole_pixels=True)
    rows = settings.draw(512, 12, 12, generator())
    moved = augment.resample(images, rows, settings.affine)
    for image, row, result in zip(images, rows, moved, strict=True):
        right, down = int(row[augment.RIGHT]), int(row[augment.DOWN])
        padded = torch.nn.functional.pad(image.float(), (2, 2, 2, 2))
        assert torch.allclose(result, padded[:, 2 - down : 14 - down, 2 - right : 14 - right], atol=1e-3)
    for column in (augment.RIGHT, augment.DOWN):
        values, counts = rows[:, column].unique(return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts.min() > 60


@pytest.mark.parametrize("smoothness", [0.5, 4.0, 7.0])
def test_warps_have_the_standard_deviation_and_the_correlation_asked_for(smoothness):
    settings = Augmentation(elastic=1.5, elastic_smoothness=smoothness)
    warp = settings.warp(20_000, 12, 16, generator()).double()
    assert warp.std().item() == pytest.approx(1.5, rel=0.02)
    deviation = warp.pow(2).mean(0).sqrt()
    assert deviation.min() > 1.4
    assert deviation.max() < 1.6
    # White noise under a Gaussian of width s is correlated as exp(-d^2 / (4 s^2)) at a distance of d.
    for distance in (1, 4, 8):
        across = (warp[..., distance:] * warp[..., :-distance]).mean() / 1.5**2
        down = (warp[:, :, distance:] * warp[:, :, :-distance]).mean() / 1.5**2
        expected = math.exp(-(distance**2) / (4 * smoothness**2)) if smoothness > 1 else None
        if expected is not None:
            assert across.item() == pytest.approx(expected, abs=0.03)
            assert down.item() == pytest.approx(expected, abs=0.03)
    assert (warp[:, 0] * warp[:, 1]).mean().abs() < 0.03  # the two axes have nothing in common


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 40)])
@pytest.mark.parametrize("elastic", [0.0, 2.0])
def test_without_crops_the_short_way_gives_the_same(shape, elastic):
    batch = images(shape=shape)
    settings = Augmentation(degrees=30, translate=3, zoom=0.2, elastic=elastic)
    rows, warp = (f(64, *shape[1:], generator()) for f in (settings.draw, settings.warp))
    assert not settings.cropped
    long, short = (resample(batch, rows, True, warp, cropped) for cropped in (True, False))
    torch.testing.assert_close(short, long, rtol=0, atol=2e-2)


def test_a_warp_moves_what_it_says():
    batch = images(8, (1, 14, 14))
    rows = Augmentation(elastic=1.0).draw(8, 14, 14, generator())
    warp = torch.zeros(8, 2, 14, 14)
    warp[:, 0], warp[:, 1] = 2.0, -1.0
    moved = resample(batch, rows, affine=True, warp=warp)
    torch.testing.assert_close(moved[..., :13, 2:], batch[..., 1:, :12].float(), rtol=0, atol=1e-2)
    assert (moved[..., 13, :] == 0).all()
    assert (moved[..., :2] == 0).all()


def test_masks_move_with_their_images():
    """A mask of few classes is moved to where its own picture, which is sharp at whole pixels, goes."""
    masks = torch.randint(0, 4, (5, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    masks[0, :3] = 255
    settings = Augmentation(flip=True, translate=3, whole_pixels=True)
    rows = settings.draw(5, 12, 12, torch.Generator().manual_seed(1))
    moved = resample_masks(masks, rows, settings.affine, None, settings.cropped)
    lifted = (masks.int() + 1) % 256
    pictures = resample(lifted[:, None].float(), rows, settings.affine, None, settings.cropped)[:, 0]
    assert moved.dtype == torch.uint8
    assert torch.equal(moved.int(), (pictures.round().int() - 1) % 256)
    assert (moved == 255).sum() > (masks == 255).sum()  # what comes from outside has no class
    rows = Augmentation(flip=True).draw(5, 12, 12, torch.Generator().manual_seed(3))
    flipped = resample_masks(masks, rows)
    for before, after in zip(masks, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(1))
    assert not torch.equal(flipped, masks)
