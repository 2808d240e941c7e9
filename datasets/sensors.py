"""What a sensor is: its bands, units and normalisation. The one vocabulary that datasets, models and platform share.

Figures: Copernicus-FM (arXiv 2503.11849, Table 1 and the public pretraining configuration).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METADATA_FIELDS = ("lon", "lat", "days", "area_km2")
"""Columns of a metadata row: degrees, degrees, days since 1970-01-01, area of one token in km^2. NaN: unknown."""


WAVELENGTH_LIMITS_NM = (100.0, 1e9)
BANDWIDTH_LIMITS_NM = (1.0, 1e9)
"""What the model's expansions cover: ultraviolet to radio waves (arXiv 2503.11849; the public code's limits)."""


class InputError(ValueError):
    """The user's input is wrong. The message says what is wrong, where, and what to do; commands exit with code 2."""


@dataclass(frozen=True)
class Sensor:
    """One sensor, or one variable of one.

    A spectral sensor has a wavelength and a bandwidth for each band; a variable has a name whose language embedding
    stands for it. Values are normalised as ``(x * scale - mean) / std``, each given per band or once for all bands.

    Raises:
        InputError: a per-band list whose length is not the number of bands, a wavelength (100..1e9 nm) or bandwidth
            (1..1e9 nm) out of range, or neither wavelengths nor a variable.
    """

    name: str
    bands: tuple[str, ...] = ()
    wavelengths_nm: tuple[float, ...] = ()
    bandwidths_nm: tuple[float, ...] = ()
    variable: str = ""
    gsd_m: float = 10.0
    patch_kernel: int = 16
    image_size: int = 224
    stored_size: int = 264
    units: str = ""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for field in ("bands", "wavelengths_nm", "bandwidths_nm", "mean", "std", "scale"):
            value = getattr(self, field)
            if isinstance(value, (int, float)):
                value = (value,)
            convert = str if field == "bands" else float
            object.__setattr__(self, field, tuple(convert(v) for v in value))
        if bool(self.wavelengths_nm) == bool(self.variable):
            raise InputError(
                f"sensor {self.name!r}: give either wavelengths_nm (spectral) or variable (a name), not both"
            )
        if not self.bands:
            bands = tuple(f"{w:g}nm" for w in self.wavelengths_nm) or (self.variable,)
            object.__setattr__(self, "bands", bands)
        channels = len(self.bands)
        if self.wavelengths_nm and not len(self.wavelengths_nm) == len(self.bandwidths_nm) == channels:
            raise InputError(
                f"sensor {self.name!r}: {channels} bands, {len(self.wavelengths_nm)} wavelengths_nm and "
                f"{len(self.bandwidths_nm)} bandwidths_nm; each band needs one of each"
            )
        for field, (low, high) in (("wavelengths_nm", WAVELENGTH_LIMITS_NM), ("bandwidths_nm", BANDWIDTH_LIMITS_NM)):
            for band, value in zip(self.bands, getattr(self, field), strict=False):
                if not low <= value <= high:  # NaN is out of range, too
                    raise InputError(
                        f"sensor {self.name!r}: band {band!r} has {field} {value:g}, outside {low:g}..{high:g} nm; "
                        "give nanometres"
                    )
        for field in ("mean", "std", "scale"):
            length = len(getattr(self, field))
            if length not in (1, channels):
                raise InputError(
                    f"sensor {self.name!r}: {field} has {length} values for {channels} bands (give 1 or {channels})"
                )
        if not all(0 < s < math.inf for s in self.std):
            raise InputError(f"sensor {self.name!r}: std must be positive and finite, it is {list(self.std)}")
        if not all(map(math.isfinite, self.mean)) or not all(math.isfinite(s) and s != 0 for s in self.scale):
            raise InputError(
                f"sensor {self.name!r}: mean must be finite and scale finite and not 0, they are {list(self.mean)} and "
                f"{list(self.scale)}"
            )
        if not isinstance(self.patch_kernel, int) or self.patch_kernel < 1:
            raise InputError(f"sensor {self.name!r}: patch_kernel={self.patch_kernel} must be a whole number of pixels")

    @property
    def channels(self) -> int:
        return len(self.bands)

    @property
    def spectral(self) -> bool:
        """True: bands are described by wavelengths; False: by the variable's name."""
        return bool(self.wavelengths_nm)

    @property
    def token_area_km2(self) -> float:
        """Ground area of one token, km^2: (patch kernel x ground sampling distance)^2."""
        return (self.patch_kernel * self.gsd_m / 1000.0) ** 2

    def normalize(self, x_CHW: Any) -> Any:
        """Raw units -> the model's units; a (..., C, H, W) array or tensor, of which a new one is returned.

        NaN and infinite values become 0 (the mean of a sensor that has statistics).

        Raises:
            InputError: the array's channel count is not the sensor's.
        """
        if x_CHW.ndim < 3 or x_CHW.shape[-3] != self.channels:
            raise InputError(
                f"sensor {self.name!r} has {self.channels} bands ({', '.join(self.bands)}); got an array of shape "
                f"{tuple(x_CHW.shape)}, expected (..., {self.channels}, height, width)"
            )
        if isinstance(x_CHW, np.ndarray):
            factor, shift, spread = (
                np.asarray(v, np.float32)[:, None, None] for v in (self.scale, self.mean, self.std)
            )
            return np.nan_to_num((x_CHW.astype(np.float32) * factor - shift) / spread, nan=0.0, posinf=0.0, neginf=0.0)
        import torch

        x = x_CHW.float()
        scale, mean, std = (_as_column(values, x.device) for values in (self.scale, self.mean, self.std))
        return torch.nan_to_num((x * scale - mean) / std, nan=0.0, posinf=0.0, neginf=0.0)

    def select(self, channels: Sequence[int]) -> Sensor:
        """The sensor with only these bands (indices), in this order."""

        def pick(values: tuple) -> tuple:
            return tuple(values[c] for c in channels) if len(values) == self.channels else values

        return dataclasses.replace(
            self,
            bands=pick(self.bands),
            wavelengths_nm=pick(self.wavelengths_nm),
            bandwidths_nm=pick(self.bandwidths_nm),
            mean=pick(self.mean),
            std=pick(self.std),
            scale=pick(self.scale),
        )


@functools.lru_cache(maxsize=4096)
def _as_column(values: tuple[float, ...], device: Any) -> Any:
    """Per-band values as a (C, 1, 1) tensor, kept on the device: copying it there for each batch would make a GPU wait."""
    import torch

    with torch.inference_mode(False):  # a tensor made in inference mode could not serve training later
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


OLCI_SCALE = (
    0.0139465, 0.0133873, 0.0121481, 0.0115198, 0.0100953, 0.0123538, 0.00879161, 0.00876539, 0.0095103, 0.00773378,
    0.00675523, 0.0071996, 0.00749684, 0.0086512, 0.00526779, 0.00530267, 0.00493004, 0.00549962, 0.00502847,
    0.00326378, 0.00324118,
)  # fmt: skip
"""Radiance scale factors of Oa01..Oa21 (band scale factors of the Sentinel-3 OLCI product)."""


def _s5p(gas: str, title: str) -> Sensor:
    return Sensor(
        name=f"s5p_{gas.lower()}",
        bands=(f"{gas}_column_number_density",),
        variable=f"Sentinel 5P {title}",
        gsd_m=1000.0,
        patch_kernel=4,
        image_size=28,
        stored_size=28,
        units="mol m-2",
    )


_ALL = (
    Sensor(
        name="s1_grd",
        bands=("VV", "VH"),
        wavelengths_nm=(5e7, 5e7),
        bandwidths_nm=(1e9, 1e9),
        units="dB",
        mean=(-12.59, -20.26),
        std=(5.26, 5.91),
    ),
    Sensor(
        name="s2_toa",
        bands=("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"),
        wavelengths_nm=(440, 490, 560, 665, 705, 740, 783, 842, 860, 940, 1370, 1610, 2190),
        bandwidths_nm=(20, 65, 35, 30, 15, 15, 20, 115, 20, 20, 30, 90, 180),
        units="reflectance x 10000",
        mean=(1612.9, 1397.6, 1322.3, 1373.1, 1561.0, 2108.4, 2390.7, 2318.7, 2581.0, 837.7, 22.0, 2195.2, 1537.4),
        std=(791.0, 854.3, 878.7, 1144.9, 1127.5, 1164.2, 1276.0, 1249.5, 1345.9, 577.5, 47.5, 1340.0, 1142.9),
    ),
    Sensor(
        name="s3_olci",
        bands=tuple(f"Oa{i:02d}" for i in range(1, 22)),
        wavelengths_nm=(
            400, 412.5, 442.5, 490, 510, 560, 620, 665, 673.75, 681.25, 708.75, 753.75, 761.25, 764.375, 767.5, 778.75,
            865, 885, 900, 940, 1029,
        ),
        bandwidths_nm=(15, 10, 10, 10, 10, 10, 10, 10, 7.5, 7.5, 10, 7.5, 7.5, 3.75, 2.5, 15, 20, 10, 10, 20, 40),
        gsd_m=300.0,
        patch_kernel=8,
        image_size=96,
        stored_size=96,
        units="mW m-2 sr-1 nm-1",
        scale=OLCI_SCALE,
    ),
    _s5p("CO", "Carbon Monoxide"),
    _s5p("NO2", "Nitrogen Dioxide"),
    _s5p("O3", "Ozone"),
    _s5p("SO2", "Sulfur Dioxide"),
    Sensor(
        name="dem",
        bands=("elevation",),
        variable="Copernicus Digital Elevation Model",
        gsd_m=30.0,
        patch_kernel=64,
        image_size=960,
        stored_size=960,
        units="m",
        std=(10000.0,),
    ),
)  # fmt: skip

SENSORS: dict[str, Sensor] = {sensor.name: sensor for sensor in _ALL}
"""The eight sensors of Copernicus-Pretrain by name, in the order in which the published model meets them."""


def get_sensor(name: str) -> Sensor:
    """The sensor of that name.

    Raises:
        InputError: no such sensor; the message lists the names.
    """
    try:
        return SENSORS[name]
    except KeyError:
        raise InputError(f"no sensor {name!r}; the sensors are {', '.join(SENSORS)}") from None
