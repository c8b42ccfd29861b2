"""Noise of the size of a rounding: against a rounding that was really made, and against the theory."""

import pytest
import torch

import spectral_sinks as ss
from spectral_sinks.spectra import rounding_noise


def matrix(rows: int = 3000, d: int = 40) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, d) @ torch.diag(torch.linspace(3, 0.5, d))


def test_noise_turns_the_dark_band_as_far_as_the_rounding_itself() -> None:
    weight, step = matrix(), 0.5
    rounded = (weight / step).round() * step
    spectrum = ss.Spectrum.from_matrix(weight, use_cache=False)
    turned = ss.Spectrum.from_matrix(rounded, use_cache=False).dark().basis
    overlap = (turned.T @ spectrum.dark().basis).square().sum() / turned.shape[1]
    found = rounding_noise(weight, torch.full_like(weight, step), spectrum)
    assert found.rotated == pytest.approx(float(1 - overlap), rel=0.5)
    assert found.size == pytest.approx(float((rounded - weight).square().mean().sqrt()), rel=0.01)
    assert found.norm == pytest.approx(float(torch.linalg.matrix_norm(rounded - weight, 2)), rel=0.05)


def test_no_step_turns_nothing() -> None:
    weight = matrix()
    spectrum = ss.Spectrum.from_matrix(weight, use_cache=False)
    found = rounding_noise(weight, torch.zeros_like(weight), spectrum)
    assert found.rotated < 1e-12
    assert found.largest_angle < 1e-4
    assert found.norm == 0
    assert found.smallest == pytest.approx(float(torch.linalg.svdvals(weight.double())[-1]))


def test_noise_far_above_the_matrix_leaves_the_overlap_of_chance() -> None:
    weight = matrix()
    spectrum = ss.Spectrum.from_matrix(weight, use_cache=False)
    found = rounding_noise(weight, torch.full_like(weight, 1e4), spectrum)
    assert found.rotated == pytest.approx(1 - 2 / 40, abs=0.06)


def test_gain_scales_the_noise_as_it_scales_the_matrix() -> None:
    weight, gain = matrix(), torch.linspace(0.1, 5, 40)
    folded = ss.Spectrum.from_matrix(weight, convention="folded", gain=gain, use_cache=False)
    direct = ss.Spectrum.from_matrix(weight * gain, use_cache=False)
    one = rounding_noise(weight, torch.full_like(weight, 0.3), folded, gain=gain)
    other = rounding_noise(weight * gain, 0.3 * gain.expand_as(weight), direct)
    assert one.size == pytest.approx(other.size)
    assert one.rotated == pytest.approx(other.rotated, rel=1e-3)
