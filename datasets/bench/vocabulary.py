"""What the benchmark's tasks share: sensors with the benchmark's own statistics, classes, label codes.

Figures: the benchmark's public configurations (github.com/zhu-xlab/Copernicus-FM, Copernicus-Bench/src/configs/dataset).
"""

from __future__ import annotations

import dataclasses

from copernicus.datasets.sensors import SENSORS

S1 = dataclasses.replace(SENSORS["s1_grd"], mean=(-12.548, -20.192), std=(5.257, 5.912))
"""Sentinel-1 backscatter in dB."""

S1_LINEAR = dataclasses.replace(
    SENSORS["s1_grd"],
    units="linear power",
    mean=(0.0981, 0.0253),
    std=(0.0430, 0.0174),
    image_size=224,
    stored_size=224,
)
"""Sentinel-1 backscatter as linear power, clamped to 0..0.15."""

S2 = dataclasses.replace(
    SENSORS["s2_toa"],
    mean=(1353.7, 1117.2, 1041.8, 946.5, 1199.1, 2003.0, 2374.0, 2301.2, 2599.7, 732.1, 12.1, 1820.6, 1118.2),
    std=(897.3, 736.0, 684.8, 620.0, 791.9, 1341.3, 1595.4, 1545.5, 1750.1, 475.1, 98.3, 1216.5, 736.7),
)
"""Sentinel-2, 13 bands."""

S2_SURFACE = dataclasses.replace(S2.select([i for i, band in enumerate(S2.bands) if band != "B10"]), name="s2_sr")
"""Sentinel-2 surface reflectance, without B10; normalised by top-of-atmosphere statistics nevertheless."""

_LCZ_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
S2_UNIT = dataclasses.replace(
    S2.select([S2.bands.index(band) for band in _LCZ_BANDS]),
    units="reflectance",
    mean=(0.112, 0.104, 0.095, 0.120, 0.200, 0.237, 0.230, 0.260, 0.182, 0.112),
    std=(0.074, 0.068, 0.062, 0.079, 0.134, 0.160, 0.155, 0.175, 0.122, 0.074),
)
"""Sentinel-2, the 10 bands of 10 and 20 m, reflectance from 0 to 1."""

S3 = dataclasses.replace(SENSORS["s3_olci"], wavelengths_nm=(*SENSORS["s3_olci"].wavelengths_nm[:-1], 1020.0))
"""Sentinel-3 OLCI; the benchmark puts Oa21 at 1020 nm where pretraining has 1029."""

EUROSAT_FILE_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")

EUROSAT_CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
"""In the order of their ids."""

BIGEARTHNET_CLASSES = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)

LC100 = {
    0: "Unknown",
    20: "Shrubs",
    30: "Herbaceous vegetation",
    40: "Cultivated and managed vegetation / agriculture",
    50: "Urban / built up",
    60: "Bare / sparse vegetation",
    70: "Snow and ice",
    80: "Permanent water bodies",
    90: "Herbaceous wetland",
    100: "Moss and lichen",
    111: "Closed forest, evergreen needle leaf",
    112: "Closed forest, evergreen broad leaf",
    113: "Closed forest, deciduous needle leaf",
    114: "Closed forest, deciduous broad leaf",
    115: "Closed forest, mixed",
    116: "Closed forest, not matching any of the other definitions",
    121: "Open forest, evergreen needle leaf",
    122: "Open forest, evergreen broad leaf",
    123: "Open forest, deciduous needle leaf",
    124: "Open forest, deciduous broad leaf",
    125: "Open forest, mixed",
    126: "Open forest, not matching any of the other definitions",
    200: "Oceans, seas",
}
"""Codes of Copernicus Global Land Service: Land Cover 100 m, in the order of their ids."""

LC100_CODES = {**{code: i for i, code in enumerate(LC100)}, 255: -100}
"""Stored code -> class id; 255 is the product's fill value, ignored."""

DFC_CODES = {0: 255, 1: 0, 2: 1, 3: 255, 4: 2, 5: 3, 6: 4, 7: 5, 8: 255, 9: 6, 10: 7}
"""DFC2020: background, savanna and snow are left out."""

DFC_CLASSES = ("Forest", "Shrubland", "Grassland", "Wetlands", "Croplands", "Urban/Built-up", "Barren", "Water")

LCZ_CLASSES = (
    "Compact high rise",
    "Compact mid rise",
    "Compact low rise",
    "Open high rise",
    "Open mid rise",
    "Open low rise",
    "Lightweight low rise",
    "Large low rise",
    "Sparsely built",
    "Heavy industry",
    "Dense trees",
    "Scattered trees",
    "Bush, scrub",
    "Low plants",
    "Bare rock or paved",
    "Bare soil or sand",
    "Water",
)
