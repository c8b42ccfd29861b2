"""Old public names lead to the same things, with a warning that says where these are now."""

import pytest

import spectral_sinks as ss


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("Move", "attention.AttentionEdit", ss.attention.AttentionEdit),
        ("Measured", "stats.Estimate", ss.stats.Estimate),
        ("test_time_registers", "vision.install_registers", ss.vision.install_registers),
    ],
)
def test_a_renamed_name_warns_and_works(old: str, new: str, value: object) -> None:
    with pytest.warns(DeprecationWarning, match=f"ss.{old} is now ss.{new}"):
        assert getattr(ss, old) is value


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ss.nothing


def test_what_a_face_lists_is_there_and_is_no_module() -> None:
    for space in (ss.spectra, ss.attention, ss.nll, ss.residual, ss.sinks, ss.circuits, ss.vision, ss.sweeps):
        for name in space.__all__:
            assert callable(value := getattr(space, name)) or isinstance(value, (int, str, tuple, dict)), name
