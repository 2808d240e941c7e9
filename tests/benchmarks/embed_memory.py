"""Memory of embedding as the data grow: the same program on a thousand, ten thousand and a hundred thousand rows.

python tests/benchmarks/embed_memory.py [--rows 1000 10000 100000]

Each size has a process of its own, which embeds synthetic shards (one token a sensor, 15 images a grid) with a small encoder in
chunks of 64 grids, makes the map and its pictures, and goes through a whole `kind: embed` but for MLflow. Memory is looked at
four times a second: what the process has for itself (anonymous), and, beside it, pages of files that the system may take back at
any time. About six minutes on two cores, 1.5 GB of disk. Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from model_speed import show
from reading.made import SMALL, make_shards, repeat_shard

ROWS_PER_GRID, GRIDS_PER_SHARD = 15, 64


class Resident:
    """The most anonymous and file-backed memory of this process while the block runs, bytes."""

    def __init__(self) -> None:
        self.anonymous = self.files = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(found["RssAnon"].split()[0]) * 1024)
            self.files = max(self.files, int(found["RssFile"].split()[0]) * 1024)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def child(shards: Path, out: Path) -> None:
    from copernicus.datasets.index import index_shards
    from copernicus.datasets.sensors import SENSORS
    from copernicus.models.zoo import create_encoder
    from copernicus.platform.embed import embed
    from copernicus.platform.embed_map import fill_map, write_map
    from copernicus.platform.embed_pictures import draw_components, draw_coverage
    from copernicus.platform.embed_stage import merged_tables
    from copernicus.platform.schema import Embed
    from copernicus.platform.session import ray_session

    encoder = create_encoder("copernicus_fm_base", SENSORS["s1_grd"], embed_dim=32, depth=1, num_heads=4).eval()
    settings = Embed(shards=[str(shards)], image_size=SMALL.crop, batch_size=16, grids_per_chunk=64, workers=0)
    with ray_session():
        index = index_shards(str(shards))
        began = time.perf_counter()
        with Resident() as embedding:
            result = embed(settings, encoder, index, out)
        seconds = time.perf_counter() - began
        with Resident() as mapping:
            globe = fill_map(merged_tables(result.grids_file), result.width, out / ".scratch")
            write_map(globe, out, settings.formats, lambda done, total, note: None)
            draw_components(globe, "memory", out / "globe.png")
            draw_coverage(globe, "memory", out / "coverage.png")
    print(json.dumps([result.images, seconds, embedding.anonymous, embedding.files, mapping.anonymous, mapping.files]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Path(given.child[0]), Path(given.child[1]))
        return
    table = []
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            (shard,) = make_shards(Path(folder) / "one", SMALL, GRIDS_PER_SHARD, GRIDS_PER_SHARD)
            count = max(1, round(rows / ROWS_PER_GRID / GRIDS_PER_SHARD))
            repeat_shard(shard, Path(folder) / "shards", count)
            out = Path(folder) / "out"
            command = [sys.executable, __file__, "--child", f"{folder}/shards", str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            images, seconds, *memory = json.loads(done.stdout.splitlines()[-1])
            print(f"{images} rows in {seconds:.0f} s")
            table.append((f"{images:,}", f"{images / seconds:.0f}", *(f"{size / 1e6:.0f}" for size in memory)))
    head = ("rows", "images/s", "embedding, MB", "its file pages", "map and pictures, MB", "their file pages")
    show("memory of embedding", head, table)


if __name__ == "__main__":
    main()
