"""What else the machine was doing: a figure without it says little."""

from __future__ import annotations

import os
import time


def load() -> str:
    one, five, _ = os.getloadavg()
    return f"{time.strftime('%H:%M:%S')}: load {one:.1f} (one minute), {five:.1f} (five)"
