"""Random changes of training images, a batch at a time, on the device that trains.

The parameters of every image are drawn first (``Augmentation.draw`` and ``Augmentation.warp``, on
the CPU, a row per image), then all images are resampled in one go (``resample``). A row depends on
nothing but the generator and its place in the batch, so processes that share a batch draw all rows and use
their own.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsereg.data.kind import Augment

TOP, LEFT, HEIGHT, WIDTH, FLIP, ANGLE, RIGHT, DOWN, ZOOM = range(9)
"""Columns of the parameters: a crop box and shifts in pixels, 0 or 1, an angle in radians, a factor."""
_TRIES = 10
"""Draws of a crop box before the fall-back, as in torchvision."""


@dataclass(frozen=True)
class Augmentation(Augment):
    """Which random changes are made; the default makes none. The fields are those of the settings.

    A crop is enlarged to the image's size; rotation is about the centre, uniform in +- ``degrees``; shifts
    along each axis and the zoom are uniform, too. With ``whole_pixels`` each shift is as likely, and an image
    that is not rotated, zoomed or cropped stays as sharp as it is. ``elastic`` is after Simard, Steinkraus,
    Platt 2003, whose alpha of 34 and sigma of 4 pixels are 1.4 pixels here.

    Raises:
        InputError: a value is outside its range.
    """

    @property
    def affine(self) -> bool:
        """Whether images are rotated, shifted, zoomed or warped."""
        return self.degrees > 0 or self.translate > 0 or self.zoom > 0 or self.elastic > 0

    @property
    def cropped(self) -> bool:
        """Whether images are cropped or mirrored."""
        return self.flip or self.crop_scale is not None

    @property
    def identity(self) -> bool:
        """Whether nothing is changed at all."""
        return not self.cropped and not self.affine

    def draw(self, num_images: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw the parameters of a batch.

        The same number of random numbers is used whatever is switched on, so that switching the flip on
        does not change the crops.

        Args:
            num_images: images in the batch, over all processes.
            height: of the images, in pixels.
            width: of the images, in pixels.
            generator: source of the random numbers, on the CPU.

        Returns:
            float32, (images, 9), on the CPU; the columns are named in this module.
        """
        u = torch.rand(num_images, 2 * _TRIES + 7, generator=generator)
        rows = torch.zeros(num_images, 9)
        rows[:, HEIGHT], rows[:, WIDTH], rows[:, ZOOM] = height, width, 1.0
        if self.crop_scale is not None:
            u_size = u[:, 7:].view(num_images, _TRIES, 2)
            rows[:, TOP : WIDTH + 1] = crop_boxes(
                u_size, u[:, :2], height, width, self.crop_scale, self.crop_ratio
            )
        if self.flip:
            rows[:, FLIP] = (u[:, 2] < 0.5).float()
        signed = 2 * u[:, 3:7] - 1
        rows[:, ANGLE] = signed[:, 0] * math.radians(self.degrees)
        rows[:, RIGHT : DOWN + 1] = self._shift(signed[:, 1:3])
        rows[:, ZOOM] = 1 + signed[:, 3] * self.zoom
        return rows

    def warp(self, num_images: int, height: int, width: int, generator: torch.Generator) -> Tensor | None:
        """Draw the elastic displacements of a batch.

        White noise on a grid as coarse as ``elastic_smoothness``, made smooth by a Gaussian of that width:
        each pixel's displacement has the standard deviation ``elastic``.

        Args:
            num_images: images in the batch, over all processes.
            height: of the images, in pixels.
            width: of the images, in pixels.
            generator: source of the random numbers, on the CPU; not that of ``draw``, whose numbers
                shall not depend on this switch.

        Returns:
            Pixels to the right and down, float32, (images, 2, height, width), on the CPU; None where
            nothing is warped.
        """
        if self.elastic == 0:
            return None
        down, across = (_smoothing(size, self.elastic_smoothness) for size in (height, width))
        noise = torch.randn(num_images, 2, across.shape[1], down.shape[1], generator=generator)
        # Products with one matrix on the right are one large product, not one for each image.
        columns = noise @ (self.elastic * down.T)
        return columns.transpose(2, 3) @ across.T

    def _shift(self, signed: Tensor) -> Tensor:
        """Shifts in pixels of uniform numbers in [-1, 1)."""
        if not self.whole_pixels:
            return signed * self.translate
        most = math.floor(self.translate)
        return torch.floor((signed + 1) / 2 * (2 * most + 1)).clamp(max=2 * most) - most


@functools.lru_cache(maxsize=8)
def _smoothing(size: int, sigma: float) -> Tensor:
    """From noise on a grid to pixels: a Gaussian's weights, (size, grid points); rows have norm 1.

    The grid's step is sigma, or a pixel where that is more, and it reaches three sigma beyond the image.
    """
    step = max(sigma, 1.0)
    beyond = math.ceil(3 * sigma / step)
    points = torch.arange(-beyond, math.ceil((size - 1) / step) + beyond + 1, dtype=torch.float64) * step
    weights = torch.exp(-((torch.arange(size, dtype=torch.float64)[:, None] - points) ** 2) / (2 * sigma**2))
    scaled: Tensor = weights / weights.norm(dim=1, keepdim=True)
    return scaled.float()


def crop_boxes(
    u_size: Tensor,
    u_place: Tensor,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Choose crop boxes with the law of torchvision's ``RandomResizedCrop.get_params``.

    The area is uniform in ``scale``, the logarithm of width / height uniform in that of ``ratio``; the
    first of the tries whose rounded box fits into the image is taken, and its place is uniform. When none
    fits: the largest centred box with a permitted ratio.

    Args:
        u_size: uniform numbers, (images, tries, 2).
        u_place: uniform numbers, (images, 2).
        height: of the images, in pixels.
        width: of the images, in pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.

    Returns:
        Whole pixels as float32, (images, 4): top, left, height, width.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u_size[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u_size[..., 1])
    w = torch.round(torch.sqrt(area * aspect))
    h = torch.round(torch.sqrt(area / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.float().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    fallback_h, fallback_w = _largest_box(height, width, ratio)
    h = torch.where(found, h.gather(1, first)[:, 0], float(fallback_h))
    w = torch.where(found, w.gather(1, first)[:, 0], float(fallback_w))
    # floor(u (n + 1)) is uniform on 0..n; the minimum guards against u (n + 1) rounding up to n + 1.
    top = torch.minimum(torch.floor(u_place[:, 0] * (height - h + 1)), height - h)
    left = torch.minimum(torch.floor(u_place[:, 1] * (width - w + 1)), width - w)
    top = torch.where(found, top, float((height - fallback_h) // 2))
    left = torch.where(found, left, float((width - fallback_w) // 2))
    return torch.stack([top, left, h, w], dim=1)


def _largest_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    if width / height < ratio[0]:
        return min(height, round(width / ratio[0])), width
    if width / height > ratio[1]:
        return height, min(width, round(height * ratio[1]))
    return height, width


def resample_masks(
    masks: Tensor, rows: Tensor, affine: bool = False, warp: Tensor | None = None, cropped: bool = True
) -> Tensor:
    """Move masks as ``resample`` moves their images: each pixel has the class of the nearest one.

    What comes from outside has no class.

    Args:
        masks: uint8, (images, height, width).
        rows: as for ``resample``.
        affine: likewise.
        warp: likewise.
        cropped: likewise.
    """
    # 0 is what comes from outside: classes are moved up by one and no class, 255, becomes 0.
    raised = (masks + 1)[:, None]
    moved = resample(raised, rows, affine, warp, cropped, mode="nearest")
    return (moved[:, 0].round().to(torch.int16) - 1).remainder(256).to(torch.uint8)


def resample(
    images: Tensor,
    rows: Tensor,
    affine: bool = False,
    warp: Tensor | None = None,
    cropped: bool = True,
    mode: str = "bilinear",
) -> Tensor:
    """Crop, enlarge, mirror, and rotate, shift, zoom and warp each image: one bilinear interpolation in all.

    Without ``affine`` this is torchvision's ``resized_crop`` (bilinear) followed by ``hflip``: a crop is
    enlarged with its own border pixels repeated, never with pixels from outside the box. With ``affine``
    the whole picture is turned, shifted and zoomed about its centre; what comes from outside is black.

    Args:
        images: (images, channels, height, width), any real type.
        rows: (images, 9) of ``Augmentation.draw``, on the device of ``images``.
        affine: whether the last four columns are used, and ``warp``.
        warp: of ``Augmentation.warp``, on the device of ``images``; None for no displacements.
        cropped: whether the columns before are used; without them there is less to compute.
        mode: of the interpolation, ``bilinear`` or ``nearest``.

    Returns:
        float32, of the shape of ``images``, on the scale of ``images``.
    """
    if affine and not cropped:
        return _moved(images, rows, warp, mode)
    height, width = images.shape[2:]
    # Pixel centres of the result, relative to the image's centre.
    x = (torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2).expand(1, 1, -1)
    y = (torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2).view(1, -1, 1)
    inside = None
    if affine:
        x, y = _unmoved(x, y, rows)
        if warp is not None:
            x, y = x - warp[:, 0], y - warp[:, 1]
        # The weight that bilinear interpolation gives to the picture where the rest is black.
        inside = _fade(x, width) * _fade(y, height)
    x = torch.where(rows[:, FLIP, None, None] > 0, -x, x)
    x = _into_box(x, rows[:, LEFT, None, None], rows[:, WIDTH, None, None], width)
    y = _into_box(y, rows[:, TOP, None, None], rows[:, HEIGHT, None, None], height)
    # grid_sample wants -1 and 1 at the outer edges of the border pixels.
    shape = (len(images), height, width)
    grid = torch.stack(
        [((2 * x + 1) / width - 1).expand(shape), ((2 * y + 1) / height - 1).expand(shape)], dim=-1
    )
    moved = functional.grid_sample(images.float(), grid, mode=mode, align_corners=False)
    if mode == "nearest":
        return moved if inside is None else moved * (inside >= 0.5)[:, None]
    return moved if inside is None else moved * inside[:, None]


def _moved(images: Tensor, rows: Tensor, warp: Tensor | None, mode: str) -> Tensor:
    """Rotate, shift, zoom and warp whole images, with what is outside of them black."""
    height, width = images.shape[2:]
    cos, sin = torch.cos(rows[:, ANGLE]) / rows[:, ZOOM], torch.sin(rows[:, ANGLE]) / rows[:, ZOOM]
    right, down = rows[:, RIGHT], rows[:, DOWN]
    x = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2
    # Where points lay before, as a part that a row of pixels shares plus one along the row.
    shared_x = sin[:, None] * y - (cos * right + sin * down)[:, None]
    shared_y = cos[:, None] * y - (cos * down - sin * right)[:, None]
    before_x = torch.addcmul(shared_x[:, :, None], cos[:, None, None], x)
    before_y = torch.addcmul(shared_y[:, :, None], sin[:, None, None], x, value=-1)
    if warp is not None:
        before_x -= warp[:, 0]
        before_y -= warp[:, 1]
    # -1 and 1 are the outer edges of the border pixels.
    grid = torch.stack([before_x.mul_(2 / width), before_y.mul_(2 / height)], dim=-1)
    return functional.grid_sample(images.float(), grid, mode=mode, align_corners=False)


def _unmoved(x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the points of the moved picture lay before: shift, rotation and zoom undone."""
    cos, sin = torch.cos(rows[:, ANGLE, None, None]), torch.sin(rows[:, ANGLE, None, None])
    zoom = rows[:, ZOOM, None, None]
    x, y = x - rows[:, RIGHT, None, None], y - rows[:, DOWN, None, None]
    return (cos * x + sin * y) / zoom, (cos * y - sin * x) / zoom


def _into_box(centred: Tensor, start: Tensor, length: Tensor, size: int) -> Tensor:
    """Coordinates of the result, relative to its centre, as pixel coordinates in the crop's box."""
    position = (centred + size / 2) * (length / size) - 0.5 + start
    return torch.minimum(torch.maximum(position, start), start + length - 1)


def _fade(centred: Tensor, size: int) -> Tensor:
    return ((size + 1) / 2 - centred.abs()).clamp(0.0, 1.0)
