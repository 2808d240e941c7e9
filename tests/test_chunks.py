"""Archives of the raw layout: whole, cut short, damaged, hostile."""

import io
import shutil
import subprocess
import tarfile

import numpy as np
import pyarrow
import pytest
from conftest import RAW_SIZES

from copernicus.datasets import chunks
from copernicus.datasets.chunks import extract_chunk, find_chunks
from copernicus.datasets.miniature.raw import pack_chunks
from copernicus.datasets.raw import load_grid
from copernicus.datasets.sensors import SENSORS, InputError

GRID, PATCH = "0200599_-70.25_-55.25", "0012345_-70.31_-55.10"
S1 = f"s1_grd_utm/images/{GRID}/{PATCH}/S1A_IW_GRDH_1SDV_2021{{:02d}}05T054321.tif"


@pytest.fixture(scope="module")
def packed(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives") / "hub"
    pack_chunks(raw[0] / "fnames_union.json.gz", folder, grids_per_chunk=2)
    return folder


def compress(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def tar_of(*members, end=True) -> bytes:
    """(name, bytes) or TarInfo, in a tar; without the end marker where asked for."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
        length = tar.offset
    return file.getvalue() if end else file.getvalue()[:length]


def extract(tmp_path, data: bytes, sensor="s1_grd"):
    """Unpacks an archive of these bytes; returns the layout, the problems and the paths of all files that came to be."""
    archive = tmp_path / "s1_grd_utm_chunk001.tar.zst"
    archive.write_bytes(data)
    into = tmp_path / "into"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    layout, problems = extract_chunk({sensor: archive}, into)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir() and p != archive)
    return layout, problems, files


def paths(layout):
    return [i.path for key in layout.keys for patches in layout.grid(key).images.values() for p in patches for i in p]


def test_chunks_are_found_by_number(packed):
    found = find_chunks(packed)
    assert list(found) == [1, 2]
    assert set(found[1]) == set(SENSORS)
    assert found[2]["s5p_no2"].name == "s5p_no2_wgs_chunk002.tar.zst"
    assert find_chunks(packed.parent)[1] == found[1]  # in a folder of the folder


def test_names_of_archives(tmp_path):
    for name in (
        "s1_grd_utm_chunk001", "s2_toa_mix_batch001", "s3_olci_wgs_001", "dem_grid_wgs_chunk0001", "s5p_co_wgs_chunk012",
        "labels_chunk001", "s1_grd_utm_chunk", "s1_grd_utm_chunk001.part",
    ):  # fmt: skip
        (tmp_path / f"{name}.tar.zst").touch()
    found = find_chunks(tmp_path)
    assert {n: sorted(a) for n, a in found.items()} == {1: ["dem", "s1_grd", "s2_toa", "s3_olci"], 12: ["s5p_co"]}
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "s1_grd_utm_chunk1.tar.zst").touch()
    with pytest.raises(InputError, match="both chunk 1 of s1_grd"):
        find_chunks(tmp_path)


def test_what_comes_out_is_what_the_miniature_packs(raw, packed, tmp_path):
    layout, problems = extract_chunk(find_chunks(packed)[1], tmp_path)
    assert problems == []
    expected = {grid.key: grid for grid in raw[1][:2]}
    assert list(layout.keys) == sorted(expected)
    for key, grid in expected.items():
        found, problems = load_grid(layout, key, RAW_SIZES)
        assert problems == []
        assert found.images == grid.images
        assert all(np.array_equal(found.arrays[s], a, equal_nan=a.dtype.kind == "f") for s, a in grid.arrays.items())


@pytest.mark.skipif(not (shutil.which("zstd") and shutil.which("tar")), reason="no tar or zstd command")
def test_archives_of_the_tar_command(raw, tmp_path):
    folder = raw[0]
    archive = tmp_path / "s5p_no2_wgs_chunk001.tar.zst"
    images = "s5p_l3_wgs/images/tropospheric_NO2_column_number_density"
    subprocess.run(["tar", "--zstd", "-cf", archive, "-C", folder, images], check=True)
    (tmp_path / "into").mkdir()
    layout, problems = extract_chunk({"s5p_no2": archive}, tmp_path / "into")
    assert problems == []
    packed = {grid.key: grid.images["s5p_no2"] for grid in raw[1] if "s5p_no2" in grid.images}
    found = {key: [image.name for image in layout.grid(key).images["s5p_no2"][0]] for key in layout.keys}
    assert found == packed


def test_images_come_in_the_order_of_their_dates(tmp_path):
    late, early = S1.format(9), S1.replace("S1A", "S1B").format(2)
    other = f"x/{GRID}/9_1.0_1.0/S1A_20210101T000000.tif"
    layout, problems, _ = extract(tmp_path, compress(tar_of((late, b"1"), (early, b"2"), (other, b"3"))))
    assert problems == []
    assert [path.rpartition("/")[2] for path in paths(layout)] == [
        "S1A_20210101T000000.tif", early.rpartition("/")[2], late.rpartition("/")[2],
    ]  # fmt: skip


def test_cut_short_anywhere(tmp_path):
    rng = np.random.default_rng(0)
    members = [(S1.format(month), rng.bytes(3000)) for month in range(1, 7)]
    whole = compress(tar_of(*members))
    layout, problems, files = extract(tmp_path, whole)
    assert problems == []
    assert len(files) == len(paths(layout)) == 6
    counts = []
    for end in [*range(0, len(whole), 997), len(whole) - 1]:
        layout, problems, files = extract(tmp_path, whole[:end])
        assert [p.reason for p in problems] == ["damaged_archive"], end
        assert problems[0].where == "s1_grd_utm_chunk001.tar.zst"
        assert len(files) == len(paths(layout))
        for file in files:  # no half ones
            assert (tmp_path / file).read_bytes() == dict(members)[
                next(n for n, _ in members if n.endswith(file[-20:]))
            ]
        counts.append(len(files))
    assert counts == sorted(counts)
    assert counts[0] == 0


def test_damage_within(tmp_path):
    members = [(S1.format(month), b"x" * 700) for month in range(1, 7)]
    # tarfile itself says nothing of these two.
    _, problems, files = extract(tmp_path, compress(tar_of(*members, end=False)))
    assert [p.reason for p in problems] == ["damaged_archive"]
    assert len(files) == 6
    broken = bytearray(tar_of(*members))
    header = broken.find(b"T054321.tif", 512 * 7)
    broken[header] ^= 0xFF
    _, problems, files = extract(tmp_path, compress(bytes(broken)))
    assert [p.reason for p in problems] == ["damaged_archive"]
    assert "precede the damage" in problems[0].detail
    assert 0 < len(files) < 6
    for data in (b"", b"not an archive at all", compress(b""), compress(b"not a tar" * 1000)):
        layout, problems, files = extract(tmp_path, data)
        assert [p.reason for p in problems] == ["damaged_archive"]
        assert (layout.keys, files) == ((), [])


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_nothing_leads_outside(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.tif").write_bytes(b"secret")
    tail = f"{GRID}/{PATCH}"
    device = tarfile.TarInfo(f"a/{tail}/null.tif")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
    hostile = [
        (f"../../{tail}/evil.tif", b"evil"),
        (f"a/../../../{tail}/evil.tif", b"evil"),
        (f"{outside}/{tail}/evil.tif", b"evil"),
        (f"/tmp/{tail}/evil.tif", b"evil"),
        link(f"a/{tail}/link.tif", str(outside / "secret.tif")),
        link(f"a/{tail}/hard.tif", str(outside / "secret.tif"), tarfile.LNKTYPE),
        device,
        link(f"a/{GRID}", str(outside)),  # a link in place of a folder, and a file through it
    ]
    strange = [
        (f"a/{GRID}/{PATCH}/..tif", b"evil"),
        (f"a/{GRID}/{PATCH}/x\n.tif", b"evil"),
        (f"a/{GRID}/{PATCH}/x.tif.exe", b"evil"),
        (f"a/{GRID}/x.tif", b"no patch"),
        ("a/x.tif", b"no grid"),
        (f"a/{GRID}/{'9' * 200}_0.0_0.0/x.tif", b"long"),
        (f"a/{GRID}/{PATCH}/{'x' * 240}.tif", b"long"),
    ]
    good = (S1.format(1), b"good")
    layout, problems, files = extract(tmp_path, compress(tar_of(*hostile, *strange, good)))
    assert [p.reason for p in problems] == ["unsafe_member"] * len(hostile) + ["unexpected_member"] * len(strange)
    assert files == [f"into/s1_grd/{GRID}/{PATCH}/{S1.format(1).rpartition('/')[2]}", "outside/secret.tif"]
    assert (outside / "secret.tif").read_bytes() == b"secret"
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert len(paths(layout)) == 1


def test_beyond_all_bounds(tmp_path, monkeypatch):
    big = (S1.format(2), b"\0" * 3_000_000)
    monkeypatch.setattr(chunks, "_LARGEST_MEMBER", 1_000_000)
    _, problems, files = extract(tmp_path, compress(tar_of((S1.format(1), b"x" * 20_000), big, (S1.format(3), b"x"))))
    assert [p.reason for p in problems] == ["damaged_archive"]
    assert "larger than any published" in problems[0].detail
    assert len(files) == 1
    # A long name that is gigabytes long is not read into memory either.
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5_000_000
    _, problems, files = extract(tmp_path, compress(header.tobuf(tarfile.GNU_FORMAT) + b"a" * 5_000_000))
    assert "larger than any published" in problems[0].detail
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "_MOST_MEMBERS", 3)
    _, problems, files = extract(tmp_path, compress(tar_of(*[(S1.format(m), b"x" * 20_000) for m in range(1, 9)])))
    assert [p.reason for p in problems] == ["damaged_archive"]
    assert len(files) <= 4


def test_a_full_disk_is_no_damage(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    archive = tmp_path / "s1_grd_utm_chunk001.tar.zst"
    archive.write_bytes(compress(tar_of((S1.format(1), b"x"))))
    with pytest.raises(OSError, match="No space left"):
        extract_chunk({"s1_grd": archive}, tmp_path)
