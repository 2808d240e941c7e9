"""Embedding's speed: images a second, ours beside encoding one by one as the public code does, in one run, taking turns.

python tests/benchmarks/embed_speed.py [--device cuda] [--precision bf16] [--grids 2] [--rounds 3] [--width 768 --depth 12]

"ours" is what a worker of ``kind: embed`` does with a chunk: whole grids of shards of published sizes (48 MB a grid, noise,
89 images each) are read on threads, batched by sensor and encoded with kept kernels. "one by one" decodes a grid's members
whole, as WebDataset's default decoder does, resizes and encodes each of its images in a batch of its own with the public
formulation (public_encoder.py), which generates its kernels at every image. Both have the same weights. On the CPU one by
one is timed on a part of the images (--public-images), a like share of every sensor's. Figures are medians over the rounds;
"reading" is ours without an encoder.

Two cores: about eight minutes by default, 1 GB of disk. With a GPU: --grids 64, about three minutes. Where the package is not
installed, see model_speed.py.
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model_speed import show
from modelling.sides import Public, our_encoder
from modelling.work import Shape
from reading.made import PUBLISHED, make_shards

from copernicus.datasets.images import read_images
from copernicus.datasets.index import GridEntry, index_shards
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.slices import DrawReader
from copernicus.platform.embed_worker import embed_grids, read_ahead


def one_by_one(side: Public, grids: list[GridEntry], device: str, images: int) -> tuple[int, float, float]:
    """Images, and seconds of reading and of encoding: a grid is decoded whole, of whose images so many are encoded."""
    done, reading, encoding = 0, 0.0, 0.0
    for grid in grids:
        began = time.perf_counter()
        with tarfile.open(grid.shard) as tar:
            arrays = {
                name: torch.load(tar.extractfile(f"{grid.key}.{name}.pth"), weights_only=True)  # type: ignore[arg-type]
                for name in SENSORS
            }
        reading += time.perf_counter() - began
        for name, sensor in SENSORS.items():
            side_px = sensor.image_size
            flat = arrays[name].reshape(-1, sensor.channels, *arrays[name].shape[-2:])
            count = len(flat) if images <= 0 else max(1, round(len(flat) * images / 89))
            for x_CHW in flat[:count]:
                began = time.perf_counter()
                x_BCHW = F.interpolate(x_CHW[None].float(), (side_px, side_px), mode="bilinear", antialias=True)
                x_BCHW = sensor.normalize(x_BCHW)
                metadata = torch.tensor([[grid.lon, grid.lat, 18262.0, sensor.token_area_km2]])
                read = time.perf_counter()
                with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=side.bf16):
                    z = side.encoder(
                        x_BCHW.to(device), metadata.to(device), sensor=sensor, patch_kernel=sensor.patch_kernel
                    )[1]
                z.float().cpu()
                reading, encoding = reading + read - began, encoding + time.perf_counter() - read
                done += 1
    return done, reading, encoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--grids", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=0, help="images of a batch; 8 on a CPU, 64 on a GPU")
    parser.add_argument("--readers", type=int, default=0)
    parser.add_argument("--public-images", type=int, default=0, help="of each grid; all on a GPU, about 16 on a CPU")
    parser.add_argument("--public-grids", type=int, default=0)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    given = parser.parse_args()
    cuda = given.device != "cpu"
    batch = given.batch or (64 if cuda else 8)
    readers = given.readers or (4 if cuda else torch.get_num_threads())
    few = given.public_images or (0 if cuda else 16)
    shape = Shape(embed_dim=given.width, depth=given.depth, num_heads=12)
    reader = DrawReader(tuple(SENSORS.values()), {n: s.image_size for n, s in SENSORS.items()}, augment=False)
    encoder = our_encoder(shape).to(given.device).eval()
    side = Public(shape, given.device, lambda name: None, given.precision == "bf16")
    side.prepare("encode")
    with tempfile.TemporaryDirectory() as folder:
        made = time.perf_counter()
        index = index_shards(list(make_shards(Path(folder), PUBLISHED, given.grids, 16)))
        grids = list(index)
        slow = grids[: given.public_grids or (2 if cuda else 1)]
        print(f"{given.grids} grids made in {time.perf_counter() - made:.0f} s; batches of {batch}, {readers} readers")

        def ours() -> tuple[int, float]:
            began = time.perf_counter()
            out = embed_grids(encoder, reader, grids, batch, given.precision, readers)
            return len(out.keys), time.perf_counter() - began

        def reading() -> tuple[int, float]:
            from concurrent.futures import ThreadPoolExecutor

            began = time.perf_counter()
            with ThreadPoolExecutor(readers) as pool:
                count = sum(len(images) for images, *_ in read_ahead(pool, reader, grids, readers + 1))
            return count, time.perf_counter() - began

        def public() -> tuple[int, float]:
            count, read, encode = one_by_one(side, slow, given.device, few)
            # Of a part of a grid's images a part of its reading.
            share = count / (89 * len(slow))
            return count, read * share + encode

        sample = read_images(reader, grids[0])[0]
        print(f"{len(sample)} images a grid; warming up")
        embed_grids(encoder, reader, grids[:1], batch, given.precision, readers)
        one_by_one(side, slow[:1], given.device, 4)
        rates: dict[str, list[float]] = {}
        parts: dict[str, Callable[[], tuple[int, float]]] = {"one by one": public, "reading": reading, "ours": ours}
        for number in range(given.rounds):
            for name, part in parts.items():
                count, seconds = part()
                rates.setdefault(name, []).append(count / seconds)
                print(f"  round {number + 1}: {name} {count / seconds:.2f} images/s")
    base = statistics.median(rates["one by one"])
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads of a CPU"
    rows = [
        (name, f"{statistics.median(r):.2f}", f"{min(r):.2f} .. {max(r):.2f}", f"{statistics.median(r) / base:.2f} x")
        for name, r in rates.items()
    ]
    show(f"images a second, {given.precision}, {device}", ("", "median", "range", "to one by one"), rows)
    rate = statistics.median(rates["ours"])
    print(f"18.7 million images: {18.7e6 / rate / 3600:.1f} h on one such device")
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else np.nan
    if cuda:
        print(f"GPU memory at most {memory:.1f} GB")


if __name__ == "__main__":
    main()
