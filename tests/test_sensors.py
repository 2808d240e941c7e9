"""What a sensor may be."""

import math

import pytest

from copernicus.datasets.sensors import SENSORS, InputError, Sensor
from copernicus.models.fourier import BANDWIDTH_NM, WAVELENGTH_NM


@pytest.mark.parametrize(
    ("wavelengths", "bandwidths", "named"),
    [
        ((490.0, 0.49), (65.0, 35.0), "band '0.49nm' has wavelengths_nm 0.49, outside 100..1e+09"),  # micrometres
        ((490.0, 2e9), (65.0, 35.0), "wavelengths_nm 2e+09"),
        ((490.0, math.nan), (65.0, 35.0), "wavelengths_nm nan"),
        ((490.0, math.inf), (65.0, 35.0), "wavelengths_nm inf"),
        ((490.0, 560.0), (65.0, 0.035), "band '560nm' has bandwidths_nm 0.035, outside 1..1e+09"),
        ((490.0, 560.0), (0.0, 35.0), "band '490nm' has bandwidths_nm 0,"),
        ((490.0, 560.0), (65.0, -35.0), "band '560nm' has bandwidths_nm -35"),
    ],
)
def test_a_wavelength_or_bandwidth_out_of_range_names_its_band(wavelengths, bandwidths, named):
    with pytest.raises(InputError) as caught:
        Sensor("mine", wavelengths_nm=wavelengths, bandwidths_nm=bandwidths)
    assert named in str(caught.value)
    assert "'mine'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limits_are_those_of_the_model_s_expansions_and_belong_to_the_range():
    for low_high, other in ((WAVELENGTH_NM, 1.0), (BANDWIDTH_NM, 100.0)):
        for edge in low_high:
            pair = {"wavelengths_nm": (edge,), "bandwidths_nm": (other,)}
            if low_high is BANDWIDTH_NM:
                pair = {"wavelengths_nm": (other,), "bandwidths_nm": (edge,)}
            Sensor("edge", **pair)
    assert all(s.channels for s in SENSORS.values())  # the published ones lie inside
