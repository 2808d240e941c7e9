"""Sweeps on small sets of real labelled images: pretrained weights beside random ones of the same shape.

python tests/benchmarks/real_labels.py DATA OUT CHECKPOINT     (a few minutes on two cores)

DATA holds ``eurosat_s2_subset/eurosat_s2`` (200 patches), ``bigearthnet_s1s2`` (six pairs) and ``terramind_examples``
(co-registered sites with land cover, from which tiles in DFC2020's layout are cut: of each site the western tiles train,
the eastern ones test). OUT gets the layouts and the sweep's runs. CHECKPOINT is one of a pretraining run of this platform.

Nothing here says how good an encoder is: the sets are far too small for that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

DFC_CODES = {1: 10, 2: 1, 3: 5, 4: 6, 5: 7, 6: 9, 7: 8, 9: 4}
"""Land cover of the sites -> DFC2020's codes: water, forest, wetlands, croplands, urban, barren, snow (ignored), grassland
(rangeland); anything else is background."""
TILE = 32
SPLITS = {"train": range(4), "val": range(4, 5), "test": range(5, 7)}
"""Columns of tiles, from the west."""

YAML = """
name: real_labels
kind: sweep
output: {out}/runs
tracking: {{uri: "sqlite:///{out}/mlflow.db"}}
sweep:
  data: {out}/bench
  cache: {out}/features
  tasks: [eurosat_s2, bigearthnet_s1, bigearthnet_s2, dfc2020_s1, dfc2020_s2]
  encoders:
    pretrained: {{weights: {checkpoint}, model: {model}}}
    random: {{weights: none, model: {model}}}
  head: light
  search: {{lr: {{low: 0.001, high: 1.0}}}}
  searcher: random
  trials: 8
  seeds: 3
  epochs: 50
  batch_size: 16
  image_size: {{eurosat_s2: 128, bigearthnet_s1: 128, bigearthnet_s2: 128, dfc2020_s1: 128, dfc2020_s2: 128}}
"""


def write_tiles(sites: Path, root: Path) -> dict[str, int]:
    """The sites' tiles as DFC2020 lays them out; those without any label are left out."""
    listed: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, site in enumerate(sorted((sites / "LULC").glob("*.tif"))):
        with rasterio.open(site) as file:
            cover, transform, crs = file.read(1), file.transform, file.crs
        codes = np.vectorize(lambda code: DFC_CODES.get(int(code), 0))(cover).astype(np.int32)
        images = {}
        for name, folder in (("s1", "S1RTC"), ("s2", "S2L1C")):
            with rasterio.open(sites / folder / site.name) as file:
                images[name] = file.read()
        images["s2"] = images["s2"].clip(0).astype(np.uint16)
        for split, columns in SPLITS.items():
            for row in range(cover.shape[0] // TILE):
                for column in columns:
                    window = Window(column * TILE, row * TILE, TILE, TILE)
                    where = rasterio.windows.transform(window, transform)
                    cut = (slice(row * TILE, (row + 1) * TILE), slice(column * TILE, (column + 1) * TILE))
                    if not (np.isin(codes[cut], (0, 3, 8), invert=True)).any():
                        continue
                    name = "ROIs{:04d}_test_{}_0_p{}.tif".format(number, "{}", row * 10 + column)
                    for kind, values in (*images.items(), ("dfc", codes[None])):
                        path = root / kind / name.format(kind)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        tile = values[(slice(None), *cut)]
                        with rasterio.open(
                            path, "w", driver="GTiff", width=TILE, height=TILE, count=len(tile), dtype=tile.dtype,
                            crs=crs, transform=where,
                        ) as file:  # fmt: skip
                            file.write(tile)
                    listed[split].append(name.format("dfc"))
    for split, names in listed.items():
        (root / f"dfc-{split}-new.csv").write_text("".join(f"{name}\n" for name in names))
    return {split: len(names) for split, names in listed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "out", "checkpoint"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--model", default="{name: copernicus_fm_base, embed_dim: 96, depth: 4, num_heads: 4}")
    options = parser.parse_args()
    data, out = options.data.absolute(), options.out.absolute()
    bench = out / "bench"
    bench.mkdir(parents=True, exist_ok=True)
    for link, target in (
        ("eurosat_s2", data / "eurosat_s2_subset/eurosat_s2"), ("bigearthnet_s1s2", data / "bigearthnet_s1s2"),
    ):  # fmt: skip
        if not (bench / link).exists():
            (bench / link).symlink_to(target)
    print("tiles with land cover:", write_tiles(data / "terramind_examples", bench / "dfc2020_s1s2"))
    experiment = out / "real_labels.yaml"
    experiment.write_text(YAML.format(out=out, checkpoint=options.checkpoint.absolute(), model=options.model))
    sys.exit(subprocess.call([sys.executable, "-m", "copernicus.platform.cli", "run", str(experiment)], cwd=out))


if __name__ == "__main__":
    main()
