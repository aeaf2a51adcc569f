"""The scattering transform: fixed features of images, with nothing in them that is trained.

Wavelets and a modulus, the same again, then an average over a neighbourhood (Mallat 2012, arXiv 1101.2286; Bruna & Mallat
2013, arXiv 1203.1513). Small shifts and deformations change it little. Under differential privacy, a linear model on it beats
networks that have to learn their features (Tramèr & Boneh 2021, arXiv 2011.11660, whose setting this is: two scales, eight
angles, second order).
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SCALES = 2
"""J: wavelets of centre frequency 3 pi / 4 and 3 pi / 8, and an average over about 2^J pixels."""
ANGLES = 8
"""L: the k-th wavelet oscillates along k pi / L, from the right towards the bottom."""
CHANNELS = 1 + SCALES * ANGLES + ANGLES**2 * SCALES * (SCALES - 1) // 2
"""Of each channel of an image: 81."""
STRIDE = 2**SCALES
"""Pixels from one position of the features to the next."""

PADDING = STRIDE
"""Pixels on each side, at least: two and a half standard deviations of the average."""
FREQUENCY = 3 * math.pi / 4
"""Of the wavelets of scale 0; at scale j it is 2^-j of that, and widths are 2^j times those of scale 0."""
WIDTH = 0.8
"""Standard deviation, in pixels, of a wavelet's envelope along its oscillation, and of the average at scale 0."""
SLANT = 4 / ANGLES
"""Envelopes are 1 / SLANT times as wide across the oscillation."""
WRAPS = 2
"""How many periods on each side the wavelets are wrapped from: they are wider than a small image."""

CHUNK_PIXELS = 1 << 16
"""Of the padded planes that are worked on at once; more would take 0.5 kB each, and leave the processor's cache."""


class Filters(NamedTuple):
    """For images of one size."""

    rows: Tensor
    """Which row of the image each padded row is, int64: (padded height,)."""
    columns: Tensor
    wavelets: Tensor
    """Their Fourier transforms, which are real: (SCALES, ANGLES, padded height, padded width), float32."""
    row_averages: tuple[Tensor, Tensor]
    """For maps of all pixels, and of every second one: (rows of the features, rows of the map), float32."""
    column_averages: tuple[Tensor, Tensor]

    def to(self, device: torch.device) -> "Filters":
        full_rows, half_rows = self.row_averages
        full_columns, half_columns = self.column_averages
        return Filters(
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            wavelets=self.wavelets.to(device),
            row_averages=(full_rows.to(device), half_rows.to(device)),
            column_averages=(full_columns.to(device), half_columns.to(device)),
        )


def features_shape(channels: int, height: int, width: int) -> tuple[int, int, int]:
    """Of one image's features."""
    return channels * CHANNELS, math.ceil(height / STRIDE), math.ceil(width / STRIDE)


def scattering(images: Tensor) -> Tensor:
    """(n, c, height, width), floats -> (n, 81 c, ceil(height / 4), ceil(width / 4)), float32, on the same device.

    The 81 channels of a channel x of an image, where psi(j, k) is the wavelet of scale j and angle k, and each map is averaged,
    by a Gaussian of standard deviation 1.6 pixels, around every fourth pixel from the first one on:

        x | |x * psi(0, k)|, 8 | |x * psi(1, k)|, 8 | ||x * psi(0, k)| * psi(1, l)|, 64, by k and then l

    Borders are mirrored, without doubling the outermost pixels. Each image is for itself, whatever its batch. No gradients.

    With phi the average, |phi^(w)|^2 + 1/2 sum (|psi^(w)|^2 + |psi^(-w)|^2) <= 1 at every frequency w: no step makes the
    difference of two images larger.
    """
    count, channels, height, width = images.shape
    filters = filters_for(height, width).to(images.device)
    planes = images.to(torch.float32).reshape(count * channels, 1, height, width)
    at_once = max(1, CHUNK_PIXELS // (len(filters.rows) * len(filters.columns)))
    with torch.no_grad():
        maps = torch.cat([_scattered(planes[start : start + at_once], filters) for start in range(0, len(planes), at_once)])
    return maps.reshape(count, *features_shape(channels, height, width))


@cache
def filters_for(height: int, width: int) -> Filters:
    """Morlet wavelets, and Gaussian averages of 1.6 pixels, for images of this size."""
    rows, columns = _mirrored(height), _mirrored(width)
    wavelets = [
        [_wavelet(len(rows), len(columns), scale=scale, angle=math.pi * k / ANGLES) for k in range(ANGLES)]
        for scale in range(SCALES)
    ]
    return Filters(
        rows=rows,
        columns=columns,
        wavelets=torch.stack([torch.stack(of_scale) for of_scale in wavelets]),
        row_averages=(_average(height, step=1), _average(height, step=2)),
        column_averages=(_average(width, step=1), _average(width, step=2)),
    )


def _scattered(planes: Tensor, filters: Filters) -> Tensor:
    """(m, 1, height, width) -> (m, 81, ceil(height / 4), ceil(width / 4))."""
    padded = planes[:, :, filters.rows][..., filters.columns]
    fine, coarse = filters.wavelets
    spectrum = torch.fft.fft2(padded)
    first_fine = _modulus(spectrum, fine)
    first_coarse = _halved_modulus(spectrum, coarse)
    second = _halved_modulus(torch.fft.fft2(first_fine), coarse)
    full = torch.cat([padded, first_fine], dim=1)
    half = torch.cat([first_coarse, second], dim=1)
    averaged = [
        rows @ maps @ columns.T
        for maps, rows, columns in zip((full, half), filters.row_averages, filters.column_averages, strict=True)
    ]
    return torch.cat(averaged, dim=1)


def _modulus(spectrum: Tensor, wavelets: Tensor) -> Tensor:
    """|maps * wavelets|: spectra of (m, 1, height, width) -> (m, ANGLES, height, width)."""
    maps: Tensor = torch.fft.ifft2(spectrum * wavelets)
    return maps.abs()


def _halved_modulus(spectrum: Tensor, wavelets: Tensor) -> Tensor:
    """|maps * wavelets| at every second pixel: spectra of (m, k, height, width) -> (m, k ANGLES, height / 2, width / 2).

    To leave pixels out is to add up the quarters of a spectrum, so that only a quarter has to be transformed back.
    """
    quarters = [torch.view_as_real(quarter.contiguous()) for quarter in _quarters(spectrum)]
    maps = []
    for wavelet in wavelets:
        folded = torch.zeros_like(quarters[0])
        for quarter, filtering in zip(quarters, _quarters(wavelet / 4), strict=True):
            # Real numbers one by one, since torch would make the filter complex.
            folded.addcmul_(quarter, filtering.unsqueeze(-1).expand(-1, -1, 2).contiguous())
        maps.append(torch.fft.ifft2(torch.view_as_complex(folded)).abs())
    return torch.stack(maps, dim=2).flatten(1, 2)


def _quarters(spectrum: Tensor) -> list[Tensor]:
    return [quarter for half in spectrum.chunk(2, dim=-2) for quarter in half.chunk(2, dim=-1)]


def _mirrored(size: int) -> Tensor:
    """Positions 0 1 2 3 2 1 0 1 ... for -PADDING, 1 - PADDING and so on; as many as a multiple of STRIDE."""
    length = math.ceil((size + 2 * PADDING) / STRIDE) * STRIDE
    period = max(1, 2 * (size - 1))
    position = (torch.arange(length) - PADDING) % period
    return torch.minimum(position, period - position).clamp(max=size - 1)


def _average(size: int, *, step: int) -> Tensor:
    """Weights of a padded map's points, `step` pixels apart, around each position of the features; each row sums to 1."""
    sigma = WIDTH * 2 ** (SCALES - 1)
    points = torch.arange(-PADDING, len(_mirrored(size)) - PADDING, step, dtype=torch.float64)
    centres = torch.arange(0, size, STRIDE, dtype=torch.float64)
    weights = torch.exp(-((centres[:, None] - points) ** 2) / (2 * sigma**2))
    return (weights / weights.sum(dim=1, keepdim=True)).to(torch.float32)


def _wavelet(height: int, width: int, *, scale: int, angle: float) -> Tensor:
    """Fourier transform, (height, width), float32, of a Morlet wavelet: an oscillation in a Gaussian envelope, less so much of
    the envelope that the sum is 0 (Bruna & Mallat 2013, section 2.1)."""
    sigma, frequency = WIDTH * 2**scale, FREQUENCY / 2**scale
    # Points of the wrapped grid: (periods, periods, height, width).
    periods = torch.arange(-WRAPS, WRAPS + 1, dtype=torch.float64)
    down = (torch.arange(height) + height * periods[:, None]).reshape(-1, 1, height, 1)
    right = (torch.arange(width) + width * periods[:, None]).reshape(1, -1, 1, width)
    along = right * math.cos(angle) + down * math.sin(angle)
    across = down * math.cos(angle) - right * math.sin(angle)
    envelope = torch.exp(-(along**2 + (SLANT * across) ** 2) / (2 * sigma**2)) * SLANT / (2 * math.pi * sigma**2)
    oscillation = torch.polar(envelope, frequency * along)
    wavelet = oscillation - envelope * (oscillation.sum() / envelope.sum())
    spectrum: Tensor = torch.fft.fft2(wavelet.sum(dim=(0, 1)))
    return spectrum.real.to(torch.float32)
