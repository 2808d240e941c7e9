"""The raw layout to shards: the same bytes as the miniature's own shards, however often the work is interrupted."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import RAW_SIZES
from test_run import copernicus, refused

from copernicus.datasets import raw_shards
from copernicus.datasets.chunks import find_chunks
from copernicus.datasets.index import index_shards
from copernicus.datasets.miniature.raw import pack_chunks
from copernicus.datasets.raw import read_layout
from copernicus.datasets.raw_shards import Settings, chunk_units, convert_unit, finished, folder_units
from copernicus.datasets.shards import shard_path, write_shard

SIZES = [f"--size={sensor}={side}" for sensor, side in RAW_SIZES.items()]
SETTINGS = Settings(RAW_SIZES, grids_per_shard=2)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "copernicus.platform.cli", "data", "convert", *map(str, arguments), *SIZES]


def convert(*arguments: str | Path) -> str:
    return copernicus(Path.cwd(), "data", "convert", *map(str, arguments), *SIZES)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, save the lock that names the process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / ".lock"
    }


def own_shards(grids, folder: Path, size: int = 2) -> dict[str, bytes]:
    folder.mkdir()
    for number in range(-(-len(grids) // size)):
        write_shard(grids[number * size : (number + 1) * size], shard_path(folder, number))
    return contents(folder)


@pytest.fixture(scope="module")
def archives(raw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    pack_chunks(raw[0] / "fnames_union.json.gz", folder, grids_per_chunk=3)
    return folder


@pytest.fixture(scope="module")
def long_list(raw, tmp_path_factory) -> Path:
    """The layout's list with its grids many times over, under numbers of their own."""
    listed = json.loads(gzip.decompress((raw[0] / "fnames_union.json.gz").read_bytes()))
    many = {}
    for number in range(40):
        entry = list(listed.values())[number % len(listed)]
        many[str(500_000 + number)] = entry | {"grid_id_coord": f"{500_000 + number}_10.00_20.00".zfill(19)}
    path = tmp_path_factory.mktemp("long") / "fnames_long.json.gz"
    path.write_bytes(gzip.compress(json.dumps(many).encode()))
    return path


# ---------------------------------------------------------------- units of work


def test_blocks_become_the_miniatures_own_shards(raw, tmp_path):
    folder, grids = raw
    out = tmp_path / "out"
    out.mkdir()
    units = folder_units(read_layout(folder), SETTINGS)
    assert [unit.name for unit in units] == ["example-000000.tar", "example-000001.tar"]
    for unit in reversed(units):  # in any order
        assert finished(unit, out) is None
        assert convert_unit(unit, out, SETTINGS) == 2
    own = own_shards(grids, tmp_path / "own")
    found = contents(out)
    assert {name: found[name] for name in own} == own
    assert set(found) - set(own) == {"manifest/example-000000.json", "manifest/example-000001.json"}
    (entry,) = finished(units[0], out) or []
    assert entry["keys"] == [grid.key for grid in grids[:2]]
    assert entry["bytes"] == len(own["example-000000.tar"])
    assert entry["problems"] == []
    assert entry["sensors"]["dem"] == sum("dem" in grid.arrays for grid in grids[:2])
    assert (
        entry["images"]["s2_toa"] == entry["s2_offset_unknown"] == sum(2 * 4 for g in grids[:2] if "s2_toa" in g.arrays)
    )
    # The reader of the training takes them.
    index = index_shards(str(out))
    assert [grid.key for grid in index] == [grid.key for grid in grids]
    assert index.problems == ()


def test_chunks_become_the_same_samples(raw, archives, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first, second = chunk_units(find_chunks(archives), SETTINGS)
    assert (first.first, second.first) == (0, 500)  # 1,000 grids in shards of two
    assert convert_unit(second, out, SETTINGS) == 1
    assert convert_unit(first, out, SETTINGS) == 3
    found = contents(out)
    assert sorted(name for name in found if name.endswith(".tar")) == [
        "example-000000.tar", "example-000001.tar", "example-000500.tar",
    ]  # fmt: skip
    assert not (out / ".work").exists() or not any((out / ".work").iterdir())

    def samples(folder):
        members = {}
        for shard in sorted(folder.glob("*.tar")):
            with tarfile.open(shard) as tar:
                members |= {info.name: tar.extractfile(info).read() for info in tar}
        return members

    own_shards(raw[1], tmp_path / "own")
    assert samples(out) == samples(tmp_path / "own")


@pytest.mark.parametrize("kind", ["folders", "chunks"])
def test_what_is_there_is_not_done_again(raw, archives, tmp_path, monkeypatch, kind):
    folders = kind == "folders"
    units = folder_units(read_layout(raw[0]), SETTINGS) if folders else chunk_units(find_chunks(archives), SETTINGS)
    for unit in units:
        convert_unit(unit, tmp_path, SETTINGS)
    whole = contents(tmp_path)
    written = []
    monkeypatch.setattr(
        raw_shards, "write_shard", lambda grids, path: (written.append(path), write_shard(grids, path))[1]
    )

    def again(verify=False):
        written.clear()
        for unit in units:
            convert_unit(unit, tmp_path, SETTINGS, verify)
        assert contents(tmp_path) == whole
        return list(written)

    shard, entry = tmp_path / "example-000001.tar", tmp_path / "manifest/example-000001.json"
    assert again() == []
    assert again(verify=True) == []
    shard.unlink()
    assert again() == [shard]
    with open(shard, "ab") as file:  # another size
        file.write(b"x")
    assert again() == [shard]
    with open(shard, "r+b") as file:  # the same size
        file.seek(2000)
        file.write(b"damage")
    assert all(finished(unit, tmp_path) for unit in units)
    assert again(verify=True) == [shard]
    entry.unlink()
    assert again() == [shard]
    entry.write_text('{"shard": ')
    assert again() == [shard]


def test_damage_is_named_in_the_entry(raw, archives, tmp_path):
    hub = tmp_path / "hub"
    shutil.copytree(archives, hub)
    (cut,) = hub.glob("s2_toa*chunk001*")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (gone,) = hub.glob("dem*chunk002*")
    gone.unlink()
    out = tmp_path / "out"
    out.mkdir()
    first, second = chunk_units(find_chunks(hub), SETTINGS)
    assert second.missing == ("dem",)
    convert_unit(first, out, SETTINGS)
    convert_unit(second, out, SETTINGS)
    problems = [tuple(p) for entry in finished(first, out) for p in entry["problems"]]
    assert [p[:2] for p in problems] == [(cut.name, "damaged_archive")]
    lost = finished(first, out)
    assert sum(e["images"].get("s2_toa", 0) for e in lost) < sum(e["images"]["s3_olci"] for e in lost)
    assert [p[:2] for p in finished(second, out)[0]["problems"]] == [["chunk 002", "missing_archive"]]


def test_a_block_without_an_image_makes_no_shard(raw, tmp_path):
    folder = tmp_path / "raw"
    shutil.copytree(raw[0], folder)
    layout = read_layout(folder)
    for key in layout.keys[:2]:
        for patches in layout.grid(key).images.values():
            for image in (i for patch in patches for i in patch):
                layout.locate(image).write_bytes(b"no image")
    out = tmp_path / "out"
    out.mkdir()
    unit = folder_units(layout, SETTINGS)[0]
    assert convert_unit(unit, out, SETTINGS) == 0
    (entry,) = finished(unit, out) or []
    assert (entry["shard"], entry["grids"], entry["keys"]) == (None, 0, [])
    assert [p[1] for p in entry["problems"]].count("no_image") == 2
    assert set(contents(out)) == {"manifest/example-000000.json"}


_LIMITED = """
import sys, resource
from pathlib import Path
from copernicus.datasets.raw import read_layout
from copernicus.datasets.raw_shards import Settings, convert_unit, folder_units
folder, out, limit = sys.argv[1:]
settings = Settings({sizes}, grids_per_shard=2)
units = folder_units(read_layout(folder), settings)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
convert_unit(units[0], Path(out), settings)
"""


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_shard_that_does_not_fit_leaves_nothing(raw, tmp_path, share):
    out = tmp_path / "out"
    out.mkdir()
    unit = folder_units(read_layout(raw[0]), SETTINGS)[0]
    convert_unit(unit, out, SETTINGS)
    size = (out / "example-000000.tar").stat().st_size
    shutil.rmtree(out)
    out.mkdir()
    script = _LIMITED.replace("{sizes}", repr(RAW_SIZES))
    done = subprocess.run(
        [sys.executable, "-c", script, raw[0], out, str(int(size * share))], capture_output=True, text=True, check=False
    )
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert contents(out) == {}
    convert_unit(unit, out, SETTINGS)
    assert finished(unit, out) is not None


# ---------------------------------------------------------------- the command


def test_the_command(raw, tmp_path, monkeypatch, capsys):
    folder, grids = raw
    out = tmp_path / "out"
    output = convert(folder, "--out", out, "--grids-per-shard", "2")
    own = own_shards(grids, tmp_path / "own")
    found = contents(out)
    assert {name: found[name] for name in found if name.endswith(".tar")} == own
    assert "4 grids in 2 shards (" in output
    assert f"pretrain.shards=[{out}]" in output
    optical = sum(8 for grid in grids if "s2_toa" in grid.arrays)
    assert f"the processing baseline of {optical} Sentinel-2 images is unknown" in output
    manifest = json.loads(found["manifest.json"])
    assert manifest["grids"] == 4
    assert [s["shard"] for s in manifest["shards"]] == sorted(own)
    assert found["skipped.txt"] == b""
    # Once more: nothing is left to do, Ray need not start.
    assert "2 done before" in convert(folder, "--out", out, "--grids-per-shard", "2")
    assert contents(out) == found
    # Another source or other settings.
    for change in (["--grids-per-shard", "3"], ["--grids-per-shard", "2", "--s2-offset", "0"]):
        assert "was begun with" in refused(
            monkeypatch, capsys, "data", "convert", folder, "--out", out, *change, *SIZES
        )
    assert contents(out) == found
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    said = refused(monkeypatch, capsys, "data", "convert", copy, "--out", out, "--grids-per-shard", "2", *SIZES)
    assert "was begun with source" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone"], "no such folder"),
        (["empty"], "is no raw layout"),
        (["raw", "--s2-offset", "-900"], "s2_offset is '-900'; it is one of auto, 0, -1000"),
        (["raw", "--patches-per-side", "2"], "for sites"),
        (["raw", "--fnames", "gone.json.gz"], "gone.json.gz"),
        (["raw", "--size", "s9=3"], "no sensor 's9'"),
        (["raw", "S2L1C=s2_toa", "--s2-offset", "0"], "--s2-offset is for the raw layout"),
        (["raw", "--out", "full"], "holds shards already"),
        (["raw", "--out", "full/example-000000.tar/out"], "is a file; give a folder"),
        (["moved"], "not one of the first"),
    ],
)
def test_wrong_input(raw, tmp_path, monkeypatch, capsys, arguments, says):
    for name in ("empty", "full", "moved"):
        (tmp_path / name).mkdir()
    (tmp_path / "raw").symlink_to(raw[0])
    (tmp_path / "full/example-000000.tar").touch()
    shutil.copy(raw[0] / "fnames_union.json.gz", tmp_path / "moved")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", "out"]
    said = refused(monkeypatch, capsys, "data", "convert", *arguments, *out)
    assert says in said
    assert said.count("\n") == 1
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def descendants(process: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(process, []))
    for child in found:
        found += children.get(child, [])
    return found


def at_work(process: int) -> list[int]:
    """Ray's workers that convert a unit just now."""
    workers = []
    for child in descendants(process):
        try:
            title = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::convert_unit"):
            workers.append(child)
    return workers


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for Ray's workers in /proc")
def test_interrupted_killed_and_its_workers_killed(raw, long_list, tmp_path):
    arguments = [raw[0], "--fnames", long_list, "--grids-per-shard", "1", "--out"]
    convert(*arguments, tmp_path / "whole")
    out = tmp_path / "out"

    def begin() -> subprocess.Popen:
        return subprocess.Popen(
            command(*arguments, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def until(run: subprocess.Popen, shards: int) -> None:
        deadline = time.monotonic() + 240
        while len(list(out.glob("manifest/example-*.json"))) < shards:
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    run = begin()
    until(run, 2)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 130, said
    done = len(list(out.glob("manifest/example-*.json")))
    assert not (out / "manifest.json").exists()

    run = begin()
    until(run, done + 3)
    run.kill()
    run.wait()
    assert not (out / "manifest.json").exists()
    done = len(list(out.glob("manifest/example-*.json")))

    run = begin()
    until(run, done + 2)
    while not (workers := at_work(run.pid)):  # between two units there is none
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert "done before" in said
    assert contents(out) == contents(tmp_path / "whole")


_SMALL_DISK = """
set -u
mkdir "$1"
mount -t tmpfs -o size=3m tmpfs "$1" || exit 99
shift
"$@"; first=$?
echo "first $first"
ls -A "$OUT"
ls -A "$OUT" | grep -c part
mount -o remount,size=64m "$OUT/.."
"$@"; second=$?
echo "second $second"
cp -r "$OUT" "$COPY"
"""


@pytest.mark.slow
def test_a_full_disk(raw, long_list, tmp_path):
    """On a small file system of its own, in a mount namespace of its own."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    disk = tmp_path / "disk"
    arguments = [raw[0], "--fnames", long_list, "--grids-per-shard", "2", "--out"]
    environment = os.environ | {"OUT": str(disk / "out"), "COPY": str(tmp_path / "copy")}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", _SMALL_DISK, "sh", str(disk), *command(*arguments, disk / "out")],
        env=environment, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    if done.returncode == 99:
        pytest.skip("no tmpfs here")
    assert "first 1\n" in output
    assert "no space is left there; free some (No space left on device)" in output
    assert "The same command goes on where it stopped" in output
    assert "Traceback" not in output
    listed = done.stdout.partition("first 1\n")[2].splitlines()
    assert "0" in listed, output  # no half-written files
    assert "second 0\n" in output
    convert(*arguments, tmp_path / "whole")
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
