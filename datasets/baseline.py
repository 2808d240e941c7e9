"""The radiometric offset of Sentinel-2: told by an image's metadata or by whoever converts it, never guessed.

Since processing baseline 04.00 (in operation since 25 January 2022) the digital numbers of Level-1C are
``reflectance x 10000 - RADIO_ADD_OFFSET`` with RADIO_ADD_OFFSET = -1000, and 0 stays "no data". Before, there was no
offset and numbers were clamped to 1..32767. Older acquisitions are reprocessed with newer baselines, so the date of an
image does not tell its baseline. The published raw images carry none: their names are ``<sensing>_<datastrip>_<tile>``.

Source: Sentinel-2 Products Specification Document (RADIO_ADD_OFFSET, PROCESSING_BASELINE; product names
``MMM_MSIL1C_<sensing>_Nxxyy_ROOO_Txxxxx_<discriminator>``, where xxyy is the baseline, and datastrip names that end in
``_Nxx.yy``); "Introduction of additional radiometric offset in PB04.00 products" (ESA, 2022).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from copernicus.datasets.sensors import InputError

POLICIES = ("auto", "0", "-1000")
"""What ``s2_offset`` may be: by each image's metadata, none in any image, or -1000 to add to all."""

UNKNOWN = "s2_offset_unknown"
"""Under this name images are counted whose metadata do not tell: they are left as they are."""

_OFFSET = -1000
_IN_NAME = re.compile(r"_N(\d{2})\.?\d{2}(?=[_.]|$)")
_BASELINE = re.compile(r"N?(\d{1,2})(?:\.\d{1,2}|\d{2})?")


def known_offset(name: str, tags: Mapping[str, str]) -> int | None:
    """The number to add to an image's digital numbers, by its metadata; None: they do not tell, or not the same thing.

    RADIO_ADD_OFFSET among the tags decides (one number for all bands); else the baseline of a PROCESSING_BASELINE tag
    and of product names in the file's name and tags. 99.99, which local reprocessing writes, is no baseline.
    """
    offsets: set[float] = set()
    majors: set[int] = {int(major) for major in _IN_NAME.findall(name)}
    for tag, value in tags.items():
        what = re.split(r"[#:.]", tag.lower())[-1]
        if re.fullmatch(r"radio_add_offset(_\w+)?", what):
            offsets |= {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", value)}
        elif what == "processing_baseline":
            if found := _BASELINE.fullmatch(value.strip()):
                majors.add(int(found[1]))
        else:
            majors |= {int(major) for major in _IN_NAME.findall(value)}
    if offsets:
        return int(offsets.pop()) if len(offsets) == 1 else None
    said = {_OFFSET if major >= 4 else 0 for major in majors if major < 90}
    return said.pop() if len(said) == 1 else None


def offset_for(policy: str, name: str, tags: Mapping[str, str]) -> int | None:
    """The number to add to an image, None where the policy is "auto" and the metadata do not tell."""
    return known_offset(name, tags) if policy == "auto" else int(policy)


def add_offset(x_CHW: np.ndarray, offset: int) -> np.ndarray:
    """Digital numbers as before baseline 04.00: 0 (no data) and NaN stay, the darkest become 1, as they did then."""
    return np.where(x_CHW > 0, np.maximum(x_CHW + offset, 1), x_CHW) if offset else x_CHW


def check_policy(policy: str) -> None:
    """Raises InputError unless it is one of `POLICIES`."""
    if policy not in POLICIES:
        raise InputError(f"s2_offset is {policy!r}; it is one of {', '.join(POLICIES)}")
