"""Embedding: every image once, against encoding one by one; chunks that go on where they stopped; damaged shards."""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import signal
import subprocess
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RAW_SIZES, SIZES, make_grid
from test_run import command, copernicus, interruptible, runs

from copernicus.datasets.augment import apply_crop, centre_crop
from copernicus.datasets.images import image_choices, read_images
from copernicus.datasets.index import from_surveys, index_shards
from copernicus.datasets.raw import read_layout
from copernicus.datasets.raw_index import survey_layout
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import grid_name, write_shards
from copernicus.datasets.slices import DrawReader
from copernicus.models.language import LanguageTable
from copernicus.models.zoo import create_encoder
from copernicus.platform.embed import EmbedFailed, embed, image_count, make_plan, open_images
from copernicus.platform.embed_worker import (
    DONE,
    GRIDS,
    IMAGES,
    ChunkEmbedder,
    ImageKey,
    embed_grids,
    grid_means,
    unpacked,
    write_chunk,
)
from copernicus.platform.grid_means import grid_tables
from copernicus.platform.run import product_missing
from copernicus.platform.schema import Embed, Encoder, Experiment, Model

MODEL = Model("copernicus_fm_base", embed_dim=32, depth=1, num_heads=4)
SETTINGS = Embed(
    encoder=Encoder(model=MODEL), shards=["given"], image_size=SIZES, batch_size=4, grids_per_chunk=5, workers=0
)


@pytest.fixture(scope="module")
def index(shards):
    return index_shards(str(shards))


@pytest.fixture(scope="module")
def encoder():
    sizes = MODEL.encoder_overrides()
    return create_encoder(MODEL.name, SENSORS["s1_grd"], 0, **sizes).eval()


@pytest.fixture(scope="module")
def reader() -> DrawReader:
    return DrawReader(tuple(SENSORS.values()), SIZES, augment=False)


def files(folder: Path) -> dict[str, str]:
    """What lies in a product's folder, by digest."""
    found = sorted(p for kind in (IMAGES, GRIDS, DONE) for p in (folder / kind).iterdir())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


# ---------------------------------------------------------------- images


def test_every_image_of_a_grid_is_there_once_and_whole(shards, index, reader):
    images, problems, listed = read_images(reader, index[3])
    assert not problems
    assert listed == len(images)
    counts = Counter(image.key.modality for image in images)
    assert counts == {"s1_grd": 6, "s2_toa": 6, "dem": 1, **{n: 3 for n in SENSORS if n.startswith(("s3", "s5p"))}}
    assert len({image.key for image in images}) == len(images)
    with tarfile.open(index[3].shard) as tar:
        stored = torch.load(tar.extractfile(f"{index[3].key}.s2_toa.pth"), weights_only=True).numpy()  # type: ignore[arg-type]
    names = make_grid(3).images["s2_toa"]
    for image in (i for i in images if i.key.modality == "s2_toa"):
        patch = int(str(image.key.local).split("_")[0])
        date = [name[0].rsplit("/", 1)[1] for name in names[patch]] if isinstance(names[patch][0], list) else None
        date = date or [name.rsplit("/", 1)[1] for name in names[patch]]
        raw = stored[patch, date.index(str(image.key.date))].astype(np.float32)
        np.testing.assert_array_equal(image.pixels, apply_crop(raw, centre_crop(40, 40), 32))
    (dem,) = [image for image in images if image.key.modality == "dem"]
    assert dem.key == ImageKey(grid_name(int(index[3].key)), "dem", None, None)


def test_an_image_that_is_repeated_in_the_shards_is_embedded_once(tmp_path, reader):
    grid = make_grid(0)
    for patch in grid.images["s1_grd"]:
        patch[2] = patch[0]  # places with fewer dates repeat some
        grid.arrays["s1_grd"][:, 2] = grid.arrays["s1_grd"][:, 0]
    write_shards(iter([grid]), tmp_path, grids_per_shard=1)
    (entry,) = index_shards(str(tmp_path))
    assert Counter(key.modality for key, _, _ in image_choices(reader, entry))["s1_grd"] == 4
    assert image_count(index_shards(str(tmp_path)), reader.sensors) == 6 + 6 + 5 * 3 + 1


# ---------------------------------------------------------------- embeddings


def test_rows_are_what_the_encoder_says_of_each_image_alone(index, reader, encoder):
    grids = index.entries([5, 6])  # the first lacks two sensors
    out = embed_grids(encoder, reader, grids, batch_size=4)
    expected = [image for grid in grids for image in read_images(reader, grid)[0]]
    assert out.keys == [image.key for image in expected]
    for row, image in zip(out.embeddings_ND, expected, strict=True):
        with torch.inference_mode():
            alone = encoder.encode(
                torch.from_numpy(image.pixels)[None],
                SENSORS[image.key.modality],
                torch.tensor([image.metadata], dtype=torch.float64),
            )[0]
        np.testing.assert_allclose(row, alone.numpy(), rtol=1e-4, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_neighbours(index, reader, encoder):
    """Bit for bit, at one size of batch: what else is in the chunk, and how full the batch is."""
    several = embed_grids(encoder, reader, index.entries(range(4)), batch_size=4, readers=3)
    alone = embed_grids(encoder, reader, index.entries([2]), batch_size=4)
    rows = [several.keys.index(key) for key in alone.keys]
    assert several.embeddings_ND[rows].tobytes() == alone.embeddings_ND.tobytes()


def test_raw_geotiffs_are_embedded_as_the_shards_made_of_them(raw, encoder, tmp_path):
    folder, grids = raw
    write_shards(iter(grids), tmp_path, grids_per_shard=len(grids))
    sizes = {"s1_grd": 16, "s2_toa": 16, "s3_olci": 8, "dem": 64, **{n: 28 for n in SENSORS if n.startswith("s5p_")}}
    reader = DrawReader(tuple(SENSORS.values()), sizes, augment=False)
    layout = from_surveys([survey_layout(read_layout(folder), RAW_SIZES)])
    found = [embed_grids(encoder, reader, list(index), batch_size=4) for index in (layout, index_shards(str(tmp_path)))]
    rows = [dict(zip(out.keys, out.embeddings_ND, strict=True)) for out in found]
    assert len(rows[0]) == len(found[0].keys) > 50
    assert rows[0].keys() == rows[1].keys()
    for key, z_D in rows[0].items():
        np.testing.assert_allclose(z_D, rows[1][key], rtol=1e-3, atol=1e-4, err_msg=str(key))

    geotiffs = dataclasses.replace(SETTINGS, shards=[], geotiffs=str(folder))
    assert open_images(geotiffs, tmp_path, lambda *said: None).keys == layout.keys


def test_grid_means_by_hand():
    keys = [ImageKey("0000001_-179.75_-90.00", "s1_grd", "0", "20200101")] * 2 + [
        ImageKey("0000002_-179.50_-90.00", "dem", None, None)
    ]
    table = grid_means(keys, np.array([[1, 2], [3, 6], [5, 7]], np.float32))
    assert table["grid_id_coord"].to_pylist() == ["0000001_-179.75_-90.00", "0000002_-179.50_-90.00"]
    assert table["embedding"].to_pylist() == [[2, 4], [5, 7]]
    assert table["images"].to_pylist() == [2, 1]
    assert (table["images_s1_grd"].to_pylist(), table["images_dem"].to_pylist()) == ([2, 0], [0, 1])


# ---------------------------------------------------------------- the product


@pytest.fixture(scope="module")
def product(ray, index, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("product")
    told: list = []
    result = embed(SETTINGS, encoder, index, folder, lambda *said: told.append(said))
    assert told[0][:2] == (0, 24)
    assert told[-1][:2] == (24, 24)
    return result


def test_the_product_has_the_published_columns_and_every_row(product, index, reader, encoder):
    table = pq.read_table(sorted((product.folder / IMAGES).iterdir()))
    assert table.schema.names == ["grid_id_coord", "modality", "local_id_coord", "date", "embedding"]
    whole = embed_grids(encoder, reader, list(index), batch_size=4)
    assert table["grid_id_coord"].to_pylist() == [key.grid for key in whole.keys]
    assert table["date"].to_pylist() == [key.date for key in whole.keys]
    assert unpacked(table["embedding"]).tobytes() == whole.embeddings_ND.tobytes()
    assert (product.images, product.grids, product.width) == (len(whole.keys), 24, 32)
    means = {int(g): z for part, z_GD in grid_tables(product.grids_file) for g, z in zip(part, z_GD, strict=True)}
    assert set(means) == {int(grid.key) for grid in index}
    one = [key.grid == grid_name(int(index[7].key)) for key in whole.keys]
    np.testing.assert_allclose(means[int(index[7].key)], whole.embeddings_ND[one].mean(0), atol=1e-6)


def test_neither_workers_nor_interruptions_change_a_byte(product, index, encoder, tmp_path):
    folder = tmp_path / "again"

    class Cut(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        if done >= 10:
            raise Cut

    with pytest.raises(Cut):
        embed(SETTINGS, encoder, index, folder, stop)
    finished = sorted(p.name for p in (folder / DONE).iterdir())
    assert 2 <= len(finished) < 5
    times = {name: (folder / DONE / name).stat().st_mtime_ns for name in finished}
    # A kill may leave a file without its manifest, half a file, and a manifest whose file has gone.
    (folder / IMAGES / ".chunk-000004.parquet.0badcafe.part").write_bytes(b"half")
    (folder / GRIDS / finished[0].replace("json", "parquet")).write_bytes(b"")
    result = embed(dataclasses.replace(SETTINGS, workers=2), encoder, index, folder)
    assert files(folder) == files(product.folder)
    assert result.grids_file.read_bytes() == product.grids_file.read_bytes()
    assert {n: (folder / DONE / n).stat().st_mtime_ns for n in finished[1:]} == {n: times[n] for n in finished[1:]}


def test_another_encoder_makes_everything_anew(product, index, tmp_path):
    other = create_encoder(MODEL.name, SENSORS["s1_grd"], 1, **MODEL.encoder_overrides()).eval()
    plan = make_plan(SETTINGS, other, product.folder)
    assert plan.done(0, [(grid.key, grid.stamp) for grid in index.entries(range(5))]) is None


def test_chunks_of_grids_without_an_image_are_empty(index, reader, encoder, tmp_path):
    radar = DrawReader((SENSORS["s1_grd"],), SIZES, augment=False)
    plan = dataclasses.replace(make_plan(SETTINGS, encoder, tmp_path), reader=radar)
    for kind in (IMAGES, GRIDS, DONE):
        (tmp_path / kind).mkdir()
    chunk = write_chunk(encoder, plan, 0, [index[5]], 1)
    assert (chunk.images, chunk.grids, chunk.lost, chunk.empty) == (0, 0, 0, (grid_name(int(index[5].key)),))
    assert plan.done(0, [(index[5].key, index[5].stamp)]) == chunk


def test_a_product_that_lost_a_file_is_not_taken_for_finished(tmp_path):
    experiment = Experiment(
        "globe", "embed", output=str(tmp_path), embed=dataclasses.replace(SETTINGS, formats=["npz"])
    )
    folder = experiment.folder / "embed"
    names = ["grids.parquet", "embed.json", "grid_0_25_globe_pix.parquet", "map.npz", "done/chunk-000000.json",
             "images/chunk-000000.parquet", "grids/chunk-000000.parquet"]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert not product_missing(experiment)
    more = dataclasses.replace(experiment, embed=dataclasses.replace(SETTINGS, formats=["npz", "zarr"]))
    assert more.folder == experiment.folder
    assert product_missing(more)
    for name in names:
        if not name.startswith("done"):
            (folder / name).unlink()
            assert product_missing(experiment), name
            (folder / name).touch()


# ---------------------------------------------------------------- what cannot be used


def test_what_cannot_be_read_is_left_out_and_named(ray, shards, encoder, tmp_path):
    """Images without a value; then a shard that has gone, and comes back."""
    grids = [make_grid(i) for i in range(4)]
    grids[1].arrays["s1_grd"][0, 1] = np.nan
    grids[2].arrays["s3_olci"][:] = np.nan
    write_shards(iter(grids), tmp_path / "shards", grids_per_shard=2)
    index = index_shards(str(tmp_path / "shards"))
    lenient = dataclasses.replace(SETTINGS, grids_per_chunk=1, max_skipped=0.2)
    result = embed(lenient, encoder, index, tmp_path / "out")
    keys = [grid.key for grid in grids]
    assert Counter(p.reason for p in result.problems) == {"all_nan": 4}
    assert sum(keys[1] in p.where for p in result.problems) == 1
    assert sum(keys[2] in p.where for p in result.problems) == 3
    assert (result.images, result.lost, result.empty) == (4 * 28 - 4, 4, ())
    strict = dataclasses.replace(lenient, max_skipped=0.01)
    for _ in range(2):  # what is done before counts as well
        with pytest.raises(
            EmbedFailed, match=r"of 112 images .* embed.max_skipped=1.0%; the first: .*all_nan"
        ) as failed:
            embed(strict, encoder, index, tmp_path / "strict")
    assert len(failed.value.problems) >= 1

    shard = tmp_path / "shards" / "example-000001.tar"
    shard.rename(tmp_path / "away.tar")
    with pytest.raises(EmbedFailed, match=r"29 of 112 images could not be used"):
        embed(lenient, encoder, index, tmp_path / "gone")
    gone = embed(dataclasses.replace(lenient, max_skipped=1.0), encoder, index, tmp_path / "gone")
    assert gone.empty == tuple(grid_name(int(key)) for key in keys[2:])
    assert (gone.images, gone.lost) == (55, 57)
    assert Counter(p.reason for p in gone.problems) == {"unreadable": 2, "all_nan": 1}
    (tmp_path / "away.tar").rename(shard)
    back = embed(lenient, encoder, index, tmp_path / "gone")
    assert (back.images, back.new, back.empty) == (result.images, 53, ())
    assert files(tmp_path / "gone") == files(tmp_path / "out")


def test_shards_that_changed_are_embedded_anew(ray, encoder, tmp_path):
    """The same layout, other numbers: the chunks of that shard alone."""
    write_shards((make_grid(i) for i in range(4)), tmp_path / "shards", grids_per_shard=2)
    chunked = dataclasses.replace(SETTINGS, grids_per_chunk=2)
    first = embed(chunked, encoder, index_shards(str(tmp_path / "shards")), tmp_path / "out")
    write_shards((make_grid(i, seed=1) for i in (2, 3)), tmp_path / "other", grids_per_shard=2)
    (tmp_path / "other" / "example-000000.tar").replace(tmp_path / "shards" / "example-000001.tar")
    again = embed(chunked, encoder, index_shards(str(tmp_path / "shards")), tmp_path / "out")
    assert (first.images, again.images, again.new) == (112, 112, 56)
    whole = embed(chunked, encoder, index_shards(str(tmp_path / "shards")), tmp_path / "anew")
    assert whole.new == 112
    assert files(tmp_path / "out") == files(tmp_path / "anew")
    (tmp_path / "shards" / "example-000001.tar").unlink()
    fewer = embed(chunked, encoder, index_shards(str(tmp_path / "shards")), tmp_path / "out")
    assert (fewer.images, fewer.new) == (56, 0)
    assert {path.stem for path in (tmp_path / "out").glob("*/chunk-*")} == {"chunk-000000"}


def test_what_the_index_found_wrong_is_named_and_limited(ray, encoder, tmp_path):
    write_shards((make_grid(i) for i in range(4)), tmp_path / "shards", grids_per_shard=1)
    shard = tmp_path / "shards" / "example-000003.tar"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 3)
    settings = dataclasses.replace(SETTINGS, shards=[str(tmp_path / "shards")], max_skipped=0.5)
    index = open_images(settings, tmp_path / "index", lambda *said: None)
    result = embed(settings, encoder, index, tmp_path / "out")
    assert any("example-000003.tar" in p.where for p in result.problems)
    with pytest.raises(EmbedFailed, match=r"of the grids could not be used, above embed.max_skipped=5.0%"):
        embed(dataclasses.replace(settings, max_skipped=0.05), encoder, index, tmp_path / "strict")


def test_a_grid_that_is_no_cell_is_left_out_and_named(ray, tmp_path):
    write_shards((make_grid(i) for i in range(2)), tmp_path / "shards", grids_per_shard=2)
    shard = tmp_path / "shards" / "example-000000.tar"
    key = make_grid(1).key
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name.replace(key, "place_7"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    settings = dataclasses.replace(SETTINGS, shards=[str(shard)])
    index = open_images(settings, tmp_path / "index", lambda *said: None)
    assert index.keys == [make_grid(0).key]
    assert [p.where for p in index.problems if p.reason == "bad_grid_id"] == ["place_7"]


def test_other_language_embeddings_are_another_encoder(encoder, tmp_path):
    other = copy.deepcopy(encoder)
    plans = [make_plan(SETTINGS, one, tmp_path).identity for one in (encoder, other)]
    assert plans[0] == plans[1]
    table = LanguageTable({SENSORS["dem"].variable: torch.ones(2048)})
    told = create_encoder(MODEL.name, SENSORS["s1_grd"], 0, **MODEL.encoder_overrides(), language=table)
    told.load_state_dict(encoder.state_dict())
    assert make_plan(SETTINGS, told.eval(), tmp_path).identity != plans[0]


def test_an_embedding_that_is_not_finite_is_named(index, reader, encoder):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def encode(self, x_BCHW, sensor, metadata=None, normalize=True):
            z_BD = encoder.encode(x_BCHW, sensor, metadata)
            if sensor.name == "dem":
                z_BD = z_BD * float("nan")
            return z_BD

    out = embed_grids(Broken(), reader, index.entries([0]), batch_size=4)
    assert [p.reason for p in out.problems] == ["not_finite"]
    assert out.problems[0].where.endswith("/dem")
    assert "dem" not in {key.modality for key in out.keys}


def test_workers_that_fit_no_node_are_refused(ray, index, encoder, tmp_path):
    with pytest.raises(InputError, match="fits no node"):
        embed(dataclasses.replace(SETTINGS, workers=1, cpus_per_worker=999.0), encoder, index, tmp_path)


def test_an_actor_opens_what_it_is_given(ray, index, encoder, tmp_path):
    plan = make_plan(SETTINGS, encoder, tmp_path)
    for kind in (IMAGES, GRIDS, DONE):
        (tmp_path / kind).mkdir()
    worker = ChunkEmbedder(ray.put(encoder), ray.put(index), plan)
    (said,) = worker({"number": np.array([4])})["chunk"]
    assert json.loads(said)["grids"] == 4


# ---------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.alone
def test_killed_it_goes_on_where_it_stopped_and_ends_with_the_same_bytes(shards, index, reader, tmp_path):
    """By Ctrl-C, and, gone on, by kill -9 of the driver and of the workers that it had."""
    sizes = ", ".join(f"{name}: {side}" for name, side in SIZES.items())
    (tmp_path / "globe.yaml").write_text(
        f"name: globe\nkind: embed\nembed:\n  shards: [{shards}]\n  image_size: {{{sizes}}}\n  batch_size: 4\n"
        "  grids_per_chunk: 1\n  workers: 1\n  formats: [npz]\n"
        "  encoder: {model: {name: copernicus_fm_base, embed_dim: 96, depth: 4, num_heads: 4}}\n"
    )
    before: set[str] = set()
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command("run", "globe.yaml"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=interruptible,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and process.poll() is None:
                if len({p.name for p in tmp_path.glob("runs/globe-*/embed/done/*.json")} - before) >= 2:
                    break
                time.sleep(0.02)
            assert process.poll() is None, process.stdout.read().decode()  # type: ignore[union-attr]
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(how)
            code = process.wait(timeout=120)
            assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
            if how == signal.SIGKILL:
                for child in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
        finally:
            if process.poll() is None:
                process.kill()
        before = {p.name for p in tmp_path.glob("runs/globe-*/embed/done/*.json")}
        assert 2 <= len(before) < 24, "interrupted too late to say anything"
    output = copernicus(tmp_path, "run", "globe.yaml")
    assert f"{len(before)} chunks done before" in output
    (folder,) = tmp_path.glob("runs/globe-*/embed")
    table = pq.read_table(sorted((folder / IMAGES).iterdir()))
    same = create_encoder("copernicus_fm_base", SENSORS["s1_grd"], 0, embed_dim=96, depth=4, num_heads=4).eval()
    undisturbed = embed_grids(same, reader, list(index), batch_size=4)
    assert table["grid_id_coord"].to_pylist() == [key.grid for key in undisturbed.keys]
    assert unpacked(table["embedding"]).tobytes() == undisturbed.embeddings_ND.tobytes()
    assert sum(len(part) for part, _ in grid_tables(folder / "grids.parquet")) == 24
    assert [run["status"] for run in runs(tmp_path).values()] == ["FINISHED"]
    assert not list(folder.glob("*/.*.part"))
