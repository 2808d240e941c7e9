"""Real images from GeoTIFF and NetCDF: the bands a sensor wants, where and when they were taken, what is missing.

Every assumption made about a file is a line of ``Image.notes``. Legend of shapes: C bands, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import rasterio.errors
import rasterio.warp
import torch
import torch.nn.functional as F
from rasterio.crs import CRS
from rasterio.transform import Affine

from copernicus.datasets.sensors import InputError, Sensor

# The driver is chosen by a file's first bytes: left to itself, GDAL would also open a text file (a VRT, say) that
# points anywhere, remote addresses included.
_MAGIC = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"CDF": "netCDF",
    b"\x89HDF": "netCDF",
}
_EPOCH = datetime.datetime(1970, 1, 1)
_KM_PER_DEGREE = 111.32  # of latitude; mean over the WGS-84 ellipsoid
_EUROSAT_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
_S2_OFFSET = 1000  # added to the digital numbers of Sentinel-2 products since processing baseline 04.00
_SUN_KELVIN = 5772.0  # effective temperature of the Sun (IAU 2015 resolution B3)
_SUN_RADIUS_AU = 6.957e8 / 1.495978707e11


@dataclass(frozen=True)
class Image:
    """One image as the model takes it: north up, float32, in the raw units of its sensor, NaN where there is no value.

    ``sensor`` describes this very array: it may have fewer bands than the one asked for, or another scale (see notes).
    """

    path: Path
    sensor: Sensor
    array_CHW: np.ndarray
    lon: float  # of the centre, degrees; NaN: unknown
    lat: float
    acquired: datetime.datetime | None  # UTC
    pixel_area_km2: float  # NaN: unknown
    missing: float  # share of the values that are NaN
    notes: tuple[str, ...]
    transform: Affine
    crs: CRS | None
    lonlat_2HW: np.ndarray | None  # of each pixel, for files that give it so instead of by a transform

    @property
    def days(self) -> float:
        """Days since 1970-01-01, whole; NaN: unknown."""
        return float("nan") if self.acquired is None else float((self.acquired - _EPOCH).days)

    @property
    def gsd_m(self) -> float:
        """Side of a pixel on the ground, metres (of a square of the same area)."""
        return math.sqrt(self.pixel_area_km2) * 1000

    def locate(self, row: float, col: float) -> tuple[float, float]:
        """(lon, lat) of a place given in pixels from the top left corner; NaN where the file does not tell."""
        return _locate(row, col, self.transform, self.crs, self.lonlat_2HW)


@dataclass
class _File:
    """What one file holds, before a sensor's bands are picked: named or unnamed layers and their place."""

    driver: str
    names: tuple[str, ...]
    layers: list[tuple[str, int]]  # (what rasterio opens, band number from 1)
    shape: tuple[int, int]
    transform: Affine
    crs: CRS | None
    tags: dict[str, str]
    lonlat_2HW: np.ndarray | None = None


def read_image(path: Path | str, sensor: Sensor, bands: Sequence[str] | None = None) -> Image:
    """Reads a GeoTIFF or NetCDF file as an image of a sensor.

    Bands are found by name (GeoTIFF descriptions, NetCDF variables) and, where a file names none, by their number:
    as many as the sensor has are taken in its order; 12 for Sentinel-2 are taken as Level-2A (no B10); 13 whose tenth
    is the darkest are taken as EuroSAT's order, B8A last, because the cirrus band B10 is dark in both orders.

    Units are checked against the sensor's and put right, always with a note: S1 that is nowhere negative is taken as
    linear power and becomes dB; S2 reflectance of 0..1 is multiplied by 10000, and the offset of 1000 of processing
    baseline 04.00 and later is taken off where all 13 bands have it; S3 may be digital numbers, radiance or
    top-of-atmosphere reflectance. The published model was pretrained on digital numbers times the radiance scale, that
    is on radiance, so reflectance becomes radiance: L = rho * E0 * cos(sun zenith) / pi, with the irradiance E0 of a
    black body of 5772 K (within 15 % of the real Sun in these bands), and the radiance scale is not applied again.

    Args:
        bands: names of the file's bands in the file's order, where the file itself has them wrong or lacks them.

    Raises:
        InputError: not readable, not an image, without the sensor's bands, or without a single valid value.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    notes: list[str] = []
    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
            # Said in the notes instead.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            file = _open(path, sensor)
            if bands is not None:
                if len(bands) != len(file.layers):
                    raise InputError(
                        f"{path}: it has {len(file.layers)} bands, but {len(bands)} names were given for them"
                    )
                file.names = tuple(bands)
            picked, sensor, by_name = _pick_bands(file, sensor, path, notes)
            array_CHW = _read_layers(file, picked, notes)
    except rasterio.errors.RasterioError as error:
        raise InputError(f"{path}: cannot be read as GeoTIFF or NetCDF ({error}); is the file whole?") from None

    if not by_name and set(sensor.bands) == set(_EUROSAT_BANDS) and _is_eurosat_order(array_CHW):
        notes.append("their order is EuroSAT's (B09 B10 B11 B12 B8A last): the 10th is the dark cirrus band")
        array_CHW = array_CHW[[_EUROSAT_BANDS.index(band) for band in sensor.bands]]
    if file.lonlat_2HW is not None and file.lonlat_2HW[1, 0].mean() < file.lonlat_2HW[1, -1].mean():
        array_CHW, file.lonlat_2HW = array_CHW[:, ::-1], file.lonlat_2HW[:, ::-1]
    array_CHW = np.where(np.isfinite(array_CHW), array_CHW, np.float32(np.nan))
    if np.isnan(array_CHW).all():
        raise InputError(f"{path}: not one valid value in the bands {', '.join(sensor.bands)} (all nodata or NaN)")

    height, width = array_CHW.shape[1:]
    lon, lat = _locate(height / 2, width / 2, file.transform, file.crs, file.lonlat_2HW)
    if math.isnan(lon):
        notes.append("location unknown: the file is not georeferenced")
    acquired, source = _find_date(path.name, file.tags)
    if acquired is None:
        notes.append("date unknown: neither in the file's name nor in its tags")
    elif source != "name":
        notes.append(f"date from the tag {source!r}")
    array_CHW, sensor = _check_units(array_CHW, sensor, path, lon, lat, acquired, notes)
    return Image(
        path=path,
        sensor=sensor,
        array_CHW=np.ascontiguousarray(array_CHW, np.float32),
        lon=lon,
        lat=lat,
        acquired=acquired,
        pixel_area_km2=_pixel_area_km2(file, lat),
        missing=float(np.isnan(array_CHW).mean()),
        notes=tuple(notes),
        transform=file.transform,
        crs=file.crs,
        lonlat_2HW=file.lonlat_2HW,
    )


def resample(x_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resamples to (height, width), bilinear and antialiased. NaN does not spread: a pixel is made of the valid ones
    under it, and is NaN where they are less than half. The same size gives the same values."""
    if tuple(x_BCHW.shape[-2:]) == size:
        return x_BCHW

    def resize(t: torch.Tensor) -> torch.Tensor:
        return F.interpolate(t, size=size, mode="bilinear", antialias=True)

    valid_BCHW = resize(x_BCHW.isfinite().to(x_BCHW.dtype))
    value_BCHW = resize(x_BCHW.nan_to_num(0.0)) / valid_BCHW.clamp(min=1e-6)
    return torch.where(valid_BCHW >= 0.5, value_BCHW, torch.nan)


def file_driver(path: Path) -> str:
    """GDAL's name of the driver for a file, by its first bytes alone.

    Raises:
        InputError: it is neither GeoTIFF nor NetCDF.
    """
    with open(path, "rb") as raw:
        start = raw.read(4)
    for magic, driver in _MAGIC.items():
        if start.startswith(magic):
            return driver
    raise InputError(f"{path}: neither GeoTIFF nor NetCDF (it begins with {start!r})")


def _open(path: Path, sensor: Sensor) -> _File:
    driver = file_driver(path)
    with rasterio.open(path, driver=driver) as source:
        if driver == "GTiff":
            names = tuple(name or "" for name in source.descriptions)
            layers = [(str(path), band) for band in source.indexes]
            return _File(driver, names, layers, source.shape, source.transform, source.crs, source.tags())
        # Subdatasets are called NETCDF:"path":variable.
        variables = {name.rsplit(":", 1)[1].strip('"'): name for name in source.subdatasets}
        if not variables:
            name = source.tags(1).get("NETCDF_VARNAME", "") if source.count else ""
            if min(source.shape) < 2:
                raise InputError(
                    f"{path}: its variable {name!r} has {source.height} x {source.width} values, a point series rather "
                    "than an image; give a gridded file"
                )
            variables = {name: str(path)}
    wanted = {_canonical(band) for band in sensor.bands}
    # Retrievals name the same column in several ways; the total column, exactly named, comes first.
    for prefix in ("", "tropospheric_"):
        found = {
            v: name for v, name in variables.items() if _canonical(v.removeprefix(prefix)) in wanted and prefix in v
        }
        if found:
            break
    else:
        raise InputError(
            f"{path}: no variable for {sensor.name} (wanted {', '.join(sensor.bands)}); the file has "
            f"{', '.join(variables) or 'none'}"
        )
    with rasterio.open(next(iter(found.values())), driver=driver) as source:
        if source.count > 1:
            raise InputError(
                f"{path}: {next(iter(found))} has {source.count} layers (times or levels); give a file of one"
            )
        file = _File(
            driver,
            tuple(v.removeprefix(prefix) for v in found),
            [(name, 1) for name in found.values()],
            source.shape,
            source.transform,
            source.crs,
            source.tags(),
        )
    if (
        file.crs is None
        and not file.transform.is_identity
        and any(
            value.startswith("degree") for tag, value in file.tags.items() if re.fullmatch(r"lat(itude)?#units", tag)
        )
    ):
        file.crs = CRS.from_epsg(4326)
    place = [
        next((variables[v] for v in names if v in variables), None)
        for names in (("lon", "longitude"), ("lat", "latitude"))
    ]
    if file.transform.is_identity and all(place):
        lonlat = []
        for name in place:
            with rasterio.open(name, driver=driver) as source:
                lonlat.append(source.read(1).astype(np.float64))
        if all(a.shape == file.shape for a in lonlat):
            file.lonlat_2HW = np.stack(lonlat)
    return file


def _canonical(name: str) -> str:
    """One spelling for the names in use: B1 and B01, Oa01_radiance and rtoa_1 (SNAP's reflectance), Sigma0_VV_db."""
    name = name.strip().lower()
    if m := re.fullmatch(r"(?:s2_)?b(\d{1,2})(a?)", name):
        return f"b{int(m[1]):02d}{m[2]}"
    if m := re.fullmatch(r"(?:oa|rtoa_)(\d{1,2})(?:_radiance|_reflectance)?", name):
        return f"oa{int(m[1]):02d}"
    if m := re.fullmatch(r"(?:.*_)?(vv|vh|hh|hv)(?:_db)?", name):
        return m[1]
    return name


def _pick_bands(file: _File, sensor: Sensor, path: Path, notes: list[str]) -> tuple[list[int], Sensor, bool]:
    """Positions in the file of the sensor's bands, in the sensor's order; the sensor with only those; found by name?"""
    where = {_canonical(name): i for i, name in reversed(list(enumerate(file.names)))}
    wanted = [_canonical(band) for band in sensor.bands]
    # Some writers call all bands the same.
    by_name = all(file.names) and len(set(file.names)) == len(file.names) and any(band in where for band in wanted)
    if by_name:
        have = [c for c, band in enumerate(wanted) if band in where]
        extra = [name for name in file.names if _canonical(name) not in wanted]
        if extra:
            notes.append(f"bands not used: {', '.join(extra)}")
        picked = [where[wanted[c]] for c in have]
    else:
        count, have = len(file.layers), list(range(sensor.channels))
        if count == 12 and sensor.channels == 13 and "B10" in sensor.bands:
            have.remove(sensor.bands.index("B10"))
        elif count != sensor.channels:
            names = f" ({', '.join(file.names)})" if any(file.names) else ""
            raise InputError(
                f"{path}: it has {count} bands{names}; {sensor.name} has {sensor.channels} ({', '.join(sensor.bands)})"
            )
        picked = list(range(count))
        first, last = sensor.bands[have[0]], sensor.bands[have[-1]]
        span = first if count == 1 else f"the {count} from {first} to {last}"
        notes.append(f"bands not named in the file: taken as {span} of {sensor.name}")
    lacking = [band for c, band in enumerate(sensor.bands) if c not in have]
    if lacking:
        notes.append(f"bands missing: {', '.join(lacking)}; encoded from the other {len(have)}")
    if lacking == ["B10"]:
        notes.append(
            "12 bands without B10 are Level-2A: surface reflectance, normalised here with top-of-atmosphere statistics"
        )
    return picked, sensor.select(have), by_name


def _read_layers(file: _File, picked: list[int], notes: list[str]) -> np.ndarray:
    """The picked layers as float32 (C, H, W), NaN for nodata, GDAL's scale and offset applied."""
    array_CHW = np.empty((len(picked), *file.shape), np.float32)
    by_source: dict[str, list[int]] = {}
    for c, position in enumerate(picked):
        by_source.setdefault(file.layers[position][0], []).append(c)
    scaled = False
    for name, channels in by_source.items():
        with rasterio.open(name, driver=file.driver) as source:
            numbers = [file.layers[picked[c]][1] for c in channels]
            values = source.read(numbers, masked=True)
            scale = np.array([source.scales[n - 1] for n in numbers])[:, None, None]
            offset = np.array([source.offsets[n - 1] for n in numbers])[:, None, None]
            if (scale != 1).any() or (offset != 0).any():
                values, scaled = values * scale + offset, True
            array_CHW[channels] = values.astype(np.float32).filled(np.nan)
    if scaled:
        notes.append("the scale and offset given in the file are applied")
    return array_CHW


def _is_eurosat_order(array_CHW: np.ndarray) -> bool:
    """Of 13 unnamed bands, whether the cirrus band, dark below any cloud, is the 10th (EuroSAT) and not the 11th."""
    tenth, eleventh = (np.nanmedian(array_CHW[c]) if np.isfinite(array_CHW[c]).any() else np.nan for c in (9, 10))
    return bool(tenth < eleventh)


def _locate(
    row: float, col: float, transform: Affine, crs: CRS | None, lonlat_2HW: np.ndarray | None
) -> tuple[float, float]:
    if lonlat_2HW is not None:
        height, width = lonlat_2HW.shape[1:]
        lon, lat = lonlat_2HW[:, min(int(row), height - 1), min(int(col), width - 1)]
        return float(lon), float(lat)
    if crs is None or transform.is_identity:
        return float("nan"), float("nan")
    x = transform.a * col + transform.b * row + transform.c
    y = transform.d * col + transform.e * row + transform.f
    try:
        (lon,), (lat,) = rasterio.warp.transform(crs, "EPSG:4326", [x], [y])
    except rasterio.errors.RasterioError:
        return float("nan"), float("nan")
    if not (math.isfinite(lon) and abs(lat) <= 90):
        return float("nan"), float("nan")
    return (lon + 180) % 360 - 180, lat


def _pixel_area_km2(file: _File, lat: float) -> float:
    if file.lonlat_2HW is not None:
        steps = np.array([np.nanmedian(np.gradient(file.lonlat_2HW[i], axis=axis)) for axis in (0, 1) for i in (0, 1)])
        (lon_row, lat_row), (lon_col, lat_col) = steps.reshape(2, 2)
        return abs(lon_row * lat_col - lat_row * lon_col) * _KM_PER_DEGREE**2 * math.cos(math.radians(lat))
    if file.crs is None or file.transform.is_identity:
        return float("nan")
    units = abs(file.transform.determinant)
    if file.crs.is_geographic:
        return units * _KM_PER_DEGREE**2 * math.cos(math.radians(lat))
    return units * (file.crs.linear_units_factor[1] / 1000) ** 2


_DATES = (
    # 20201002T221611, the date-time of Sentinel product names (BigEarthNet drops a leading zero of the hour).
    (r"(?<!\d)(\d{8})T(\d{5,6})(?!\d)", "%Y%m%d"),
    # 2021-07-23T13:22:41.000000000 and 2021-07-23
    (r"(?<!\d)(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2}:\d{2}))?(?!\d)", "%Y-%m-%d"),
    # 14-APR-2017 10:27:29.454657
    (r"(?<!\d)(\d{1,2}-[A-Za-z]{3}-\d{4})(?:[T ](\d{2}:\d{2}:\d{2}))?", "%d-%b-%Y"),
    (r"(?<!\d)((?:19|20)\d{6})(?!\d)()", "%Y%m%d"),
)


def parse_date(text: str) -> datetime.datetime | None:
    """The first date in a text, with its time of day where there is one, in the forms that product names, index files
    and tags use; None: no date."""
    for pattern, form in _DATES:
        for day, clock in re.findall(pattern, text):
            digits = clock.replace(":", "").zfill(6)
            try:
                return datetime.datetime.strptime(f"{day} {digits}", f"{form} %H%M%S")
            except ValueError:
                continue  # digits that only look like a date
    return None


def _find_date(name: str, tags: dict[str, str]) -> tuple[datetime.datetime | None, str]:
    """When the image was taken (the first time in a product's name is the start of sensing) and what says so."""
    date = parse_date(name)
    if date:
        return date, "name"
    for tag, value in tags.items():
        if tag.split("#")[-1].lower() in (
            "datetime",
            "start_date",
            "time_coverage_start",
            "datetime_start",
            "source_product",
        ):
            date = parse_date(value)
            if date:
                return date, tag
    return None, ""


def _check_units(
    array_CHW: np.ndarray,
    sensor: Sensor,
    path: Path,
    lon: float,
    lat: float,
    acquired: datetime.datetime | None,
    notes: list[str],
) -> tuple[np.ndarray, Sensor]:
    """The array in the units that the sensor's normalisation expects, or the sensor in those of the array."""
    top = float(np.nanmax(array_CHW))
    if sensor.units == "dB" and np.nanmin(array_CHW) >= 0:
        if np.nanmedian(array_CHW) > 10:
            raise InputError(
                f"{path}: backscatter up to {top:g} is uncalibrated; give sigma or gamma nought, linear or in dB"
            )
        notes.append("backscatter is nowhere negative: taken as linear power and converted to dB")
        with np.errstate(divide="ignore"):
            decibel = 10 * np.log10(array_CHW)
        return np.where(np.isfinite(decibel), decibel, np.nan), sensor
    if sensor.units == "reflectance x 10000":
        if top <= 2:
            notes.append(f"values up to {top:.2f} are reflectance: multiplied by 10000")
            array_CHW = array_CHW * 10000
        # Only the cirrus band tells a bright scene from an offset: below any cloud it is near 0.
        if sensor.channels == 13 and np.nanmin(array_CHW) >= _S2_OFFSET:
            notes.append(
                f"all 13 bands are >= {_S2_OFFSET}: the offset of processing baseline 04.00 and later is taken off"
            )
            array_CHW = array_CHW - _S2_OFFSET
        return array_CHW, sensor
    if sensor.units == "mW m-2 sr-1 nm-1" and top <= 800:
        # Digital numbers of a daylight scene go far beyond 800; radiance cannot exceed E0 / pi, about 620.
        physical = dataclasses.replace(sensor, scale=(1.0,))
        if top > 2:
            notes.append(f"values up to {top:.0f} are radiance already: the radiance scale is not applied")
            return array_CHW, physical
        cosine, sun = _sun_cosine(lon, lat, acquired)
        notes.append(
            f"values up to {top:.2f} are top-of-atmosphere reflectance: converted to radiance ({sun}); the radiance "
            "scale is not applied"
        )
        factor_C = solar_irradiance(np.array(sensor.wavelengths_nm)) * cosine / math.pi
        return array_CHW * factor_C[:, None, None].astype(np.float32), physical
    return array_CHW, sensor


def solar_irradiance(wavelength_nm: np.ndarray) -> np.ndarray:
    """Irradiance at 1 au of a black body of the Sun's size and effective temperature, mW m-2 nm-1 (Planck's law)."""
    metres = np.asarray(wavelength_nm, np.float64) * 1e-9
    planck, light, boltzmann = 6.62607015e-34, 299792458.0, 1.380649e-23
    radiance = 2 * planck * light**2 / metres**5 / np.expm1(planck * light / (metres * boltzmann * _SUN_KELVIN))
    return math.pi * radiance * _SUN_RADIUS_AU**2 * 1e-9 * 1e3


def _sun_cosine(lon: float, lat: float, acquired: datetime.datetime | None) -> tuple[float, str]:
    """Cosine of the sun's zenith angle (declination after Cooper 1969, mean solar time), and how it was found."""
    if acquired is None or math.isnan(lon) or (acquired.hour, acquired.minute, acquired.second) == (0, 0, 0):
        return math.cos(math.radians(45)), "sun assumed 45 degrees high, time or place being unknown"
    declination = math.radians(23.45) * math.sin(2 * math.pi * (284 + acquired.timetuple().tm_yday) / 365)
    hours = acquired.hour + acquired.minute / 60 + acquired.second / 3600 + lon / 15 - 12
    phi = math.radians(lat)
    cosine = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(
        math.radians(15 * hours)
    )
    cosine = max(cosine, 0.05)  # a sun below the horizon means a wrong time: the image has light
    return cosine, f"sun {90 - math.degrees(math.acos(cosine)):.0f} degrees high"
