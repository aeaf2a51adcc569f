import math

import numpy as np
import pytest
import torch

from broker_fl.tasks.digits import digits
from broker_fl.tasks.scattering import ANGLES, features_shape, filters_for, scattering

FIRST_FINE, FIRST_COARSE, SECOND = slice(1, 9), slice(9, 17), slice(17, 81)


def _noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _grating(angle, *, frequency, size=32):
    at = torch.arange(size)
    return torch.cos(frequency * (at[None, :] * math.cos(angle) + at[:, None] * math.sin(angle)))[None, None]


@pytest.mark.parametrize(
    ("images", "features"),
    [
        ((1, 28, 28), (81, 7, 7)),
        ((3, 32, 32), (243, 8, 8)),
        ((1, 8, 8), (81, 2, 2)),
        ((3, 30, 17), (243, 8, 5)),
        ((2, 1, 5), (162, 1, 2)),
    ],
)
def test_there_are_81_channels_for_each_at_a_quarter_of_the_resolution(images, features):
    found = scattering(_noise(2, *images))
    assert features_shape(*images) == features
    assert found.shape == (2, *features)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_channels_of_an_image_are_scattered_each_for_itself():
    images = _noise(2, 3, 16, 16)
    alone = [scattering(images[:, channel : channel + 1]) for channel in range(3)]
    torch.testing.assert_close(scattering(images), torch.cat(alone, dim=1), rtol=0, atol=1e-6)


def test_a_constant_image_has_nothing_but_its_average():
    found = scattering(torch.full((1, 1, 28, 28), 0.7))[0]
    torch.testing.assert_close(found[0], torch.full((7, 7), 0.7), rtol=0, atol=1e-6)
    assert found[1:].abs().max() < 1e-6


@pytest.mark.parametrize(("scale", "channels"), [(0, FIRST_FINE), (1, FIRST_COARSE)])
@pytest.mark.parametrize("k", range(ANGLES))
def test_a_grating_excites_the_wavelet_of_its_angle_and_frequency_most(scale, channels, k):
    first = scattering(_grating(math.pi * k / ANGLES, frequency=0.75 * math.pi / 2**scale))[0, 1:17, 2:6, 2:6].mean(dim=(1, 2))
    assert first.argmax() == channels.start - 1 + k


def test_second_order_is_the_angle_of_what_modulates_by_the_angle_of_what_is_modulated():
    """A fine grating of angle 2, stronger and weaker along angle 5."""
    envelope = 1 + _grating(5 * math.pi / ANGLES, frequency=0.375 * math.pi)
    image = envelope * _grating(2 * math.pi / ANGLES, frequency=0.75 * math.pi)
    second = scattering(image)[0, SECOND, 2:6, 2:6].mean(dim=(1, 2)).reshape(ANGLES, ANGLES)
    assert second[2].argmax() == 5


def test_small_shifts_change_features_less_than_pixels():
    image = _noise(1, 1, 40, 40) - 0.5
    here, there = image[..., 4:36, 4:36], image[..., 5:37, 3:35]
    pixels = (here - there).norm() / here.norm()
    first, second = scattering(here)[:, 1:], scattering(there)[:, 1:]
    assert (first - second).norm() / first.norm() < 0.25 * pixels


def test_small_deformations_change_features_less_than_pixels():
    at = torch.linspace(-1, 1, 32)
    bent = torch.stack([at.expand(32, 32) + 0.06 * torch.sin(3 * at)[:, None], at[:, None].expand(32, 32)], dim=-1)
    image = _grating(math.pi / 8, frequency=0.75 * math.pi)
    moved = torch.nn.functional.grid_sample(image, bent[None], mode="bicubic", padding_mode="reflection", align_corners=True)
    pixels = (image - moved).norm() / image.norm()
    first, second = scattering(image)[:, 1:], scattering(moved)[:, 1:]
    assert pixels > 0.5
    assert (first - second).norm() / first.norm() < 0.5 * pixels


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (8, 8), (1, 5), (17, 31)])
def test_filters_together_hold_no_more_energy_than_the_image(size):
    """Littlewood-Paley: |phi^|^2 + 1/2 sum (|psi^(w)|^2 + |psi^(-w)|^2) <= 1."""
    filters = filters_for(*size)
    height, width = filters.wavelets.shape[2:]
    squares = filters.wavelets.double().square().sum(dim=(0, 1))
    mirrored = torch.roll(torch.flip(squares, (0, 1)), (1, 1), (0, 1))
    down, right = (2 * math.pi * torch.fft.fftfreq(count, dtype=torch.float64) for count in (height, width))
    average = torch.exp(-(1.6**2) * (down[:, None] ** 2 + right**2))
    assert (average + (squares + mirrored) / 2).max() < 1 + 1e-4


@pytest.mark.parametrize("images", [_noise(4, 1, 28, 28) - 0.5, torch.eye(28)[None, None] - 0.04])
def test_features_hold_no_more_energy_than_the_image(images):
    assert 16 * scattering(images).square().sum() < images.square().sum()


def test_features_are_what_sums_over_the_plane_would_give():
    """The same by convolutions written out, at one position far from the borders."""
    size, centre = 48, 24
    image = np.random.default_rng(0).random((size, size))

    def wavelet(scale, k):
        reach = np.arange(-16, 17)
        right, down = np.meshgrid(reach, reach)
        angle, sigma = math.pi * k / 8, 0.8 * 2**scale
        along = right * math.cos(angle) + down * math.sin(angle)
        across = down * math.cos(angle) - right * math.sin(angle)
        envelope = np.exp(-(along**2 + across**2 / 4) / (2 * sigma**2)) / (4 * math.pi * sigma**2)
        wave = envelope * np.exp(1j * 0.75 * math.pi / 2**scale * along)
        return wave - envelope * wave.sum() / envelope.sum()

    def convolved(maps, kernel):
        windows = np.lib.stride_tricks.sliding_window_view(maps, kernel.shape)
        return np.abs(np.einsum("abij,ij->ab", windows, kernel[::-1, ::-1]))

    def averaged(maps, *, step):
        reach = (np.arange(len(maps)) - len(maps) // 2)[len(maps) // 2 % step :: step]
        weights = np.exp(-(reach**2) / (2 * 1.6**2))
        weights /= weights.sum()
        return weights @ maps[len(maps) // 2 % step :: step, len(maps) // 2 % step :: step] @ weights

    def around(maps, reach):
        middle = len(maps) // 2
        return maps[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]

    # Mirrored without end, so that the widest window fits; its middle is `centre`.
    mirrored = np.pad(image, 48, mode="reflect")
    window = mirrored[48 + centre - 40 : 48 + centre + 41, 48 + centre - 40 : 48 + centre + 41]
    fine = convolved(window, wavelet(0, 3))
    found = scattering(torch.tensor(image)[None, None])[0, :, centre // 4, centre // 4]
    assert found[0].item() == pytest.approx(averaged(around(window, 8), step=1), rel=1e-4)
    assert found[1 + 3].item() == pytest.approx(averaged(around(fine, 8), step=1), rel=1e-3)
    assert found[9 + 6].item() == pytest.approx(averaged(around(convolved(window, wavelet(1, 6)), 8), step=2), rel=1e-3)
    assert found[17 + 8 * 3 + 6].item() == pytest.approx(averaged(around(convolved(fine, wavelet(1, 6)), 8), step=2), rel=1e-3)


def test_an_image_has_the_same_features_every_time_and_in_any_batch():
    images = _noise(70, 1, 28, 28)
    together = scattering(images)
    assert torch.equal(together, scattering(images))
    alone = torch.cat([scattering(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_features_scale_with_the_image_and_forget_its_sign_and_level():
    images = digits().train_examples(None).inputs[:8]
    features = scattering(images)
    torch.testing.assert_close(scattering(2 * images), 2 * features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scattering(1 - images)[:, 1:], features[:, 1:], rtol=1e-3, atol=1e-5)


def test_mirroring_an_image_mirrors_its_features_and_their_angles():
    image = _noise(1, 1, 29, 29)
    angles = [-k % ANGLES for k in range(ANGLES)]
    mirrored = scattering(image.flip(3))[0, FIRST_FINE]
    torch.testing.assert_close(mirrored, scattering(image)[0, FIRST_FINE][angles].flip(2), rtol=0, atol=1e-2)


def test_borders_are_mirrored_and_padded_sizes_divide():
    filters = filters_for(6, 1)
    assert filters.rows.tolist() == [4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 1]
    assert filters.columns.tolist() == [0] * 12


def test_integers_and_doubles_give_float32_and_no_gradients():
    images = _noise(1, 1, 8, 8).double().requires_grad_()
    found = scattering(images)
    assert found.dtype == torch.float32
    assert not found.requires_grad
