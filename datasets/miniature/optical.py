"""What optical sensors see of the planet: reflectance of mixed materials, seasons, atmosphere, clouds and shadows.

A pixel is a mixture of a few materials; a material has one spectrum, from which the bands of Sentinel-2 and Sentinel-3
are read alike. Spectra are rounded figures in the range of the public spectral libraries, gas and scattering terms are
one-line models: plausible, not radiative transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter

from copernicus.datasets.miniature.noise import keyed_rng, plane_noise, stream
from copernicus.datasets.miniature.planet import Cover, Surface, Window
from copernicus.datasets.sensors import SENSORS

_KNOTS_NM = (400, 443, 490, 560, 620, 665, 705, 740, 783, 865, 940, 1020, 1370, 1610, 2190)
_SPECTRA = {
    "water": (0.045, 0.042, 0.038, 0.026, 0.013, 0.009, 0.006, 0.004, 0.003, 0.002, 0.001, 0.001, 0, 0, 0),
    "silty water": (0.06, 0.065, 0.08, 0.11, 0.10, 0.085, 0.06, 0.035, 0.032, 0.02, 0.012, 0.01, 0.004, 0.003, 0.002),
    "needles": (0.018, 0.02, 0.023, 0.04, 0.03, 0.025, 0.07, 0.17, 0.21, 0.23, 0.23, 0.23, 0.15, 0.11, 0.05),
    "leaves": (0.02, 0.024, 0.03, 0.06, 0.04, 0.032, 0.11, 0.30, 0.38, 0.40, 0.39, 0.40, 0.26, 0.19, 0.08),
    "grass": (0.03, 0.035, 0.042, 0.085, 0.062, 0.05, 0.14, 0.31, 0.37, 0.40, 0.39, 0.40, 0.30, 0.25, 0.13),
    "dry grass": (0.05, 0.06, 0.08, 0.13, 0.165, 0.185, 0.21, 0.235, 0.255, 0.29, 0.30, 0.32, 0.34, 0.35, 0.25),
    "crop": (0.025, 0.03, 0.037, 0.08, 0.055, 0.042, 0.135, 0.36, 0.45, 0.48, 0.46, 0.47, 0.30, 0.23, 0.10),
    "soil": (0.05, 0.06, 0.075, 0.11, 0.145, 0.165, 0.18, 0.195, 0.21, 0.235, 0.245, 0.26, 0.29, 0.32, 0.28),
    "sand": (0.10, 0.13, 0.18, 0.26, 0.33, 0.36, 0.38, 0.395, 0.41, 0.43, 0.44, 0.46, 0.48, 0.52, 0.49),
    "rock": (0.09, 0.10, 0.12, 0.145, 0.16, 0.17, 0.175, 0.18, 0.185, 0.19, 0.195, 0.20, 0.22, 0.23, 0.20),
    "asphalt": (0.06, 0.068, 0.078, 0.09, 0.10, 0.105, 0.11, 0.115, 0.12, 0.13, 0.135, 0.14, 0.155, 0.165, 0.16),
    "tiles": (0.05, 0.06, 0.075, 0.11, 0.18, 0.215, 0.23, 0.245, 0.26, 0.28, 0.285, 0.29, 0.31, 0.33, 0.30),
    "concrete": (0.13, 0.15, 0.17, 0.20, 0.215, 0.225, 0.23, 0.235, 0.24, 0.25, 0.255, 0.26, 0.27, 0.275, 0.25),
    "metal": (0.28, 0.32, 0.35, 0.37, 0.38, 0.385, 0.39, 0.39, 0.395, 0.40, 0.40, 0.405, 0.38, 0.37, 0.34),
    "snow": (0.88, 0.89, 0.89, 0.88, 0.87, 0.86, 0.85, 0.84, 0.82, 0.78, 0.72, 0.62, 0.25, 0.09, 0.06),
}  # fmt: skip
_MATERIALS = tuple(_SPECTRA)
SNOW_MATERIAL = _MATERIALS.index("snow")
_CLOUD_KNOTS = (0.80, 0.80, 0.80, 0.80, 0.80, 0.80, 0.79, 0.79, 0.78, 0.76, 0.74, 0.72, 0.50, 0.52, 0.38)

# One-way gas transmittance at the bands that look into an absorption line; others pass freely.
_GAS = {
    "s2_toa": {"B09": 0.42, "B10": 0.012},
    "s3_olci": {"Oa13": 0.45, "Oa14": 0.55, "Oa15": 0.62, "Oa19": 0.83, "Oa20": 0.52, "Oa10": 0.98, "Oa11": 0.97},
}
# Solar irradiance outside the atmosphere, mW m-2 nm-1.
_SUN_KNOTS_NM = (400, 412.5, 442.5, 490, 510, 560, 620, 665, 708.75, 753.75, 778.75, 865, 900, 940, 1029)
_SUN = (1580, 1710, 1890, 1940, 1920, 1800, 1650, 1530, 1410, 1270, 1180, 960, 905, 830, 690)

OpticalSensor = Literal["s2_toa", "s3_olci"]


@dataclass(frozen=True)
class _Bands:
    """What a sensor's bands read of materials and atmosphere; (band,) or (band, material)."""

    reflectance_BM: np.ndarray
    cloud_B: np.ndarray
    scattering_B: np.ndarray  # molecules, reflectance of the path
    haze_B: np.ndarray  # per unit of aerosol depth
    gas_B: np.ndarray

    @staticmethod
    def of(sensor: OpticalSensor) -> _Bands:
        spec = SENSORS[sensor]
        nm = np.array(spec.wavelengths_nm)
        spectra = np.stack([np.interp(nm, _KNOTS_NM, _SPECTRA[m]) for m in _MATERIALS], axis=1)
        gas = np.array([_GAS[sensor].get(band, 1.0) for band in spec.bands])
        return _Bands(
            spectra, np.interp(nm, _KNOTS_NM, _CLOUD_KNOTS), 0.11 * (443 / nm) ** 4, 0.16 * (550 / nm) ** 1.3, gas
        )


_BANDS = {sensor: _Bands.of(sensor) for sensor in ("s2_toa", "s3_olci")}
_SUN_S3 = np.interp(SENSORS["s3_olci"].wavelengths_nm, _SUN_KNOTS_NM, _SUN)


@dataclass(frozen=True)
class Sky:
    """Clouds over a window, (H, W): how much of the ground they hide and how much of the sun they block, 0..1."""

    cloud: np.ndarray
    shadow: np.ndarray
    haze: float  # aerosol optical depth
    high: float  # how far up the clouds are, 0..1


def day_of_year(days: float) -> float:
    return days % 365.25


def air_temperature(surface: Surface, days: float) -> np.ndarray:
    """(H, W) degrees C on a day, since 1970-01-01. The warmest day is in July in the north, in January in the south."""
    phase = np.cos(2 * np.pi * (day_of_year(days) - 201) / 365.25) * (1 if surface.window.lat >= 0 else -1)
    return surface.temperature + surface.season * phase


def sun_zenith_cosine(lat: float, days: float) -> float:
    """At about 10:30 local time; at least 0.15, for scenes of the polar night are not taken."""
    declination = np.radians(23.4) * np.cos(2 * np.pi * (day_of_year(days) - 172) / 365.25)
    phi, hour = np.radians(lat), np.radians(22.5)
    cosine = np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(hour)
    return float(max(cosine, 0.15))


def greenness(surface: Surface, days: float) -> np.ndarray:
    """(H, W) 0..1: how much of the vegetation that follows the seasons is green."""
    warm = 1 / (1 + np.exp(-(air_temperature(surface, days) - 8) / 2.5))
    rain = np.cos(2 * np.pi * (day_of_year(days) - 220) / 365.25) * (1 if surface.window.lat >= 0 else -1)
    return warm * np.clip(0.15 + 1.5 * surface.moisture + 0.25 * rain * np.clip(1 - surface.moisture, 0, 1), 0, 1)


def crop_height(surface: Surface, days: float) -> np.ndarray:
    """(H, W) 0..1: the stand of the annual crop; each parcel has its date, winter crops ripen first."""
    winter = (surface.parcel * 3.7) % 1.0 < 0.5
    peak = np.where(winter, 140, 215) + 40 * ((surface.parcel * 17.3) % 1.0 - 0.5)
    peak = peak if surface.window.lat >= 0 else peak + 182.6
    from_peak = (day_of_year(days) - peak + 182.6) % 365.25 - 182.6
    return np.exp(-((from_peak / 48) ** 2)) * np.clip(surface.moisture * 3, 0.3, 1)


def snow_share(surface: Surface, days: float) -> np.ndarray:
    """(H, W) 0..1 of the ground that snow covers on a day."""
    cold = 1 / (1 + np.exp((air_temperature(surface, days) + 2.5 - 0.5 * surface.broad) * 1.5))
    return cold * np.clip(surface.moisture * 3 - 0.2, 0, 1)


def materials(surface: Surface, days: float) -> np.ndarray:
    """(material, H, W) shares that add up to 1."""
    share = {material: np.zeros(surface.cover.shape) for material in _MATERIALS}
    cover, fine, plot = surface.cover, surface.fine, surface.plot
    green, stand = greenness(surface, days), crop_height(surface, days)

    def put(where: np.ndarray, parts: dict[str, np.ndarray | float]) -> None:
        for material, amount in parts.items():
            share[material][where] = amount[where] if isinstance(amount, np.ndarray) else amount

    silt = np.clip(0.35 + 0.2 * surface.broad, 0.05, 0.9)
    shallow = np.clip(0.12 + 0.1 * surface.broad, 0, 0.5)
    put(cover == Cover.SEA_LAKE, {"water": 1 - shallow, "silty water": shallow})
    put(cover == Cover.RIVER, {"water": 1 - silt, "silty water": silt})

    floor = np.clip(0.12 - 0.06 * fine, 0.02, 0.3)
    leaf = (1 - floor) * (1 - surface.evergreen)
    put(
        cover == Cover.FOREST,
        {
            "needles": (1 - floor) * surface.evergreen,
            "leaves": leaf * green,
            "rock": 0.4 * leaf * (1 - green),
            "dry grass": 0.6 * leaf * (1 - green) + 0.5 * floor,
            "soil": 0.5 * floor,
        },
    )
    shrub = np.clip(0.22 + 0.22 * fine, 0, 0.7)
    gap = np.clip(0.55 - surface.moisture + 0.08 * fine, 0.04, 0.6)
    open_grass = np.clip(1 - shrub - gap, 0, 1)
    total = shrub + gap + open_grass
    shrub, gap, open_grass = shrub / total, gap / total, open_grass / total
    put(
        cover == Cover.HERBACEOUS,
        {
            "leaves": 0.5 * shrub * green,
            "needles": 0.35 * shrub,
            "dry grass": open_grass * (1 - green) + shrub * (0.65 - 0.5 * green),
            "grass": open_grass * green,
            "soil": gap,
        },
    )
    grazed = np.clip(0.08 + 0.12 * ((surface.parcel * 5.1) % 1.0) + 0.03 * fine, 0, 0.4)
    lush = np.clip(1.15 * green, 0, 1) * (1 - grazed)
    put(cover == Cover.PASTURE, {"grass": lush, "dry grass": 1 - grazed - lush, "soil": grazed})
    stubble = 0.35 * ((surface.parcel * 11.9) % 1.0) * (1 - stand)
    put(cover == Cover.ANNUAL_CROP, {"crop": stand * 0.95, "soil": 1 - 0.95 * stand - stubble, "dry grass": stubble})
    trees = np.clip(0.15 + 0.6 * surface.rows + 0.08 * fine, 0, 0.9)
    put(
        cover == Cover.PERMANENT_CROP,
        {
            "leaves": trees * (0.25 + 0.65 * green),
            "dry grass": trees * (0.75 - 0.65 * green),
            "grass": (1 - trees) * 0.45 * green,
            "soil": (1 - trees) * (1 - 0.45 * green),
        },
    )
    house, street = plot < 0.45, surface.street > 0
    garden = np.where(house, 0.3, 1.0) * (1 - 0.9 * street)
    roof = np.where(house & ~street, 0.7, 0.0)
    red = (plot * 9.7) % 1.0 < 0.6
    put(
        cover == Cover.RESIDENTIAL,
        {
            "tiles": roof * red,
            "concrete": roof * ~red + 0.15 * street,
            "asphalt": 0.75 * street,
            "leaves": garden * (0.1 + 0.35 * green),
            "grass": garden * 0.4 * green,
            "dry grass": garden * (0.9 - 0.75 * green),
        },
    )
    # Works stand on a few plots joined: a parcel's number, not a plot's, chooses the roof.
    hall = (surface.parcel * 23.1) % 1.0
    bright, yard = hall > 0.7, (plot < 0.25) | street
    put(
        cover == Cover.INDUSTRIAL,
        {
            "metal": np.where(yard, 0.0, np.where(bright, 0.75, 0.08)),
            "concrete": np.where(yard, 0.25, np.where(bright, 0.15, 0.55)),
            "asphalt": np.where(yard, 0.65, np.where(bright, 0.1, 0.3)),
            "dry grass": np.where(yard, 0.1, np.where(bright, 0.0, 0.07)),
        },
    )
    put(
        cover == Cover.HIGHWAY,
        {"asphalt": 0.8, "concrete": 0.05, "grass": 0.15 * green, "dry grass": 0.15 * (1 - green)},
    )
    sandy = np.clip(0.5 + 0.35 * surface.broad + (surface.temperature - 12) / 40, 0, 1)
    put(cover == Cover.BARE, {"sand": 0.8 * sandy, "rock": 0.9 - 0.8 * sandy, "soil": 0.1})
    put(cover == Cover.SNOW, {"snow": 0.93, "rock": 0.07})

    shares = np.stack([share[m] for m in _MATERIALS])
    # Snow hides the ground, half of it under trees, not water nor what is warm.
    white = snow_share(surface, days)
    hides = np.array([0, 0, 0.5, 0.85, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.5, 0.7, 0.6, 0.6, 1.0])
    hidden = shares * hides[:, None, None] * white
    shares = shares - hidden
    shares[SNOW_MATERIAL] += hidden.sum(axis=0)
    return shares


def sky(seed: int, window: Window, days: float, cover: float, scene: int) -> Sky:
    """Clouds of a scene.

    Args:
        cover: about the share of the sky in clouds, 0..1.
        scene: tells scenes of the same place and day apart.
    """
    rng = keyed_rng(seed, "sky", scene, int(days))
    extent = window.size * window.gsd_m
    wavelength = max(extent * rng.uniform(0.3, 0.8), window.gsd_m * 8)
    octaves = int(np.clip(np.log2(wavelength / window.gsd_m / 2), 1, 5))
    haze, high, thickness = rng.gamma(2.0, 0.06), rng.uniform(0, 1), rng.uniform(1.2, 3.5)
    if cover <= 0:
        clear = np.zeros((window.size, window.size))
        return Sky(clear, clear, haze, high)
    key = stream(seed, f"cloud {scene} {int(days)}")
    threshold = float(np.clip(1.9 - 3.6 * cover, -2.2, 2.2))
    # The shadow lies away from the sun: seen from the shadowed ground, the cloud stands towards it.
    reach = (1500 + 5500 * high) * 0.9 * min(1.0, extent / 9000)
    towards = 0.6 * reach, -0.8 * reach * (1 if window.lat >= 0 else -1)

    def hidden(east: float, north: float) -> np.ndarray:
        noise = plane_noise(key, window.east_m + east, window.north_m + north, wavelength, octaves, 0.55)
        return 1 - np.exp(-thickness * np.maximum(noise - threshold, 0) ** 1.3)

    cloud, shadow = hidden(0, 0), hidden(*towards)
    return Sky(cloud, shadow * (1 - cloud), haze, high)


def reflectance(
    sensor: OpticalSensor, surface: Surface, days: float, air: Sky, gain: float = 1.0, blur: float = 0.0
) -> np.ndarray:
    """(band, H, W) reflectance at the top of the atmosphere.

    Args:
        gain: of the ground as a whole, for what a scene's viewing angle does.
        blur: pixels, standard deviation; the ground is looked up at points, a wide pixel mixes what lies around.
    """
    bands = _BANDS[sensor]
    ground = _ground(bands, surface, days, blur)
    zenith = sun_zenith_cosine(surface.window.lat, days)
    light = _light(surface, zenith, gain, air)
    loss = np.exp(-(0.5 * bands.haze_B / 0.16 * air.haze + bands.scattering_B) / zenith * 0.7)
    path = bands.scattering_B * 0.75 / zenith**0.4 + bands.haze_B * air.haze
    clear = path[:, None, None] + loss[:, None, None] * ground * light
    # A high cloud has little of the absorbing gas above it.
    column = np.stack([bands.gas_B, bands.gas_B ** (1 - 0.75 * air.high)])[:, :, None, None]
    return clear * column[0] * (1 - air.cloud) + bands.cloud_B[:, None, None] * column[1] * air.cloud


def _ground(bands: _Bands, surface: Surface, days: float, blur: float = 0.0) -> np.ndarray:
    """(band, H, W) reflectance of the ground, evenly lit."""
    shares = materials(surface, days)
    size = shares.shape[1]
    ground = (bands.reflectance_BM @ shares.reshape(len(_MATERIALS), -1)).reshape(-1, size, size)
    return gaussian_filter(ground, (0, blur, blur), mode="nearest") if blur else ground


def _light(surface: Surface, zenith: float, gain: float, air: Sky) -> np.ndarray:
    """(H, W) what slopes, canopies and shadows of clouds make of the sun's light; 1 on open, level ground."""
    tangent = float(np.sqrt(1 - zenith**2) / zenith)
    south = 1 if surface.window.lat >= 0 else -1
    shade = 1 + min(tangent, 2.0) * (0.6 * surface.slope_east - 0.8 * south * surface.slope_north)
    texture = 1 + np.where(surface.cover == Cover.FOREST, 0.12, 0.04) * surface.fine
    return gain * np.clip(shade, 0.35, 1.6) * np.clip(texture, 0.5, 1.5) * (1 - 0.72 * air.shadow)


def s2_toa(
    seed: int, surface: Surface, days: float, scene: int, clouds: float = 0.0, gain: float | None = None
) -> np.ndarray:
    """(13, H, W) int16, reflectance x 10000 in the sensor's band order."""
    rng = keyed_rng(seed, "s2", scene, int(days))
    gain = rng.uniform(0.85, 1.15) if gain is None else gain
    toa = reflectance("s2_toa", surface, days, sky(seed, surface.window, days, clouds, scene), gain)
    noise = rng.normal(size=toa.shape).astype(np.float32) * (12 + 0.012 * np.sqrt(toa * 10000) * 10)
    return np.clip(np.rint(toa * 10000 + noise), 1, 28000).astype(np.int16)


def s2_surface(seed: int, surface: Surface, days: float, scene: int, gain: float) -> np.ndarray:
    """(13, H, W) int16, reflectance x 10000 under a clear sky with the atmosphere removed, in the sensor's band order.

    Where gas absorbs nearly all light (B09, B10) a real product holds little but the correction's noise.
    """
    rng = keyed_rng(seed, "s2 surface", scene, int(days))
    air = sky(seed, surface.window, days, 0.0, scene)
    light = _light(surface, sun_zenith_cosine(surface.window.lat, days), gain, air)
    ground = _ground(_BANDS["s2_toa"], surface, days) * light
    noise = rng.normal(size=ground.shape).astype(np.float32) * (15 + 0.12 * np.sqrt(ground * 10000))
    return np.clip(np.rint(ground * 10000 + noise), 1, 16000).astype(np.int16)


def s3_olci(seed: int, surface: Surface, days: float, scene: int, air: Sky) -> np.ndarray:
    """(21, H, W) float32 radiance, mW m-2 sr-1 nm-1."""
    rng = keyed_rng(seed, "s3", scene, int(days))
    toa = reflectance("s3_olci", surface, days, air, rng.uniform(0.9, 1.1), blur=0.7)
    radiance = toa * (_SUN_S3 * sun_zenith_cosine(surface.window.lat, days) / np.pi)[:, None, None]
    noise = rng.normal(size=toa.shape).astype(np.float32) * (0.004 * radiance + 0.05)
    return np.maximum(radiance + noise, 0.05).astype(np.float32)


def swath_gap(seed: int, size: int, scene: int, days: float, chance: float) -> np.ndarray:
    """(H, W) bool: pixels beyond the swath's edge, in a share `chance` of the scenes."""
    rng = keyed_rng(seed, "swath", scene, int(days))
    if rng.uniform() >= chance:
        return np.zeros((size, size), bool)
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.95)
    row, column = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    return row * np.sin(angle) + column * np.cos(angle) > reach
