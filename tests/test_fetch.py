"""`copernicus data fetch` against a hub on loopback: whole, cut off, killed, changed, wrong, missing, hostile, too large."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from bench_files import write_cloud
from hub_server import HubServer
from object_store import Proxy

from copernicus.datasets import handles, storage
from copernicus.datasets.bench import archive
from copernicus.datasets.bench.archive import ARCHIVES, ArchiveError, contents, unpack
from copernicus.datasets.bench.tasks import TASKS
from copernicus.platform import cli, fetch

CLOUD = "l1_cloud_s3/cloud_s3.zip"
LCZ = {f"l3_lcz_s2/lcz_{split}.h5": os.urandom(200_000) for split in ("train", "val", "test")}
COUNTS = {"train": 3, "val": 1, "test": 1}


def zipped(folder: Path) -> bytes:
    """A zip of a folder, its name first in each member's."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    return stream.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != fetch.MANIFEST)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "cloud_s3"
    write_cloud(folder, COUNTS)
    return folder


@pytest.fixture(scope="module")
def cloud_zip(cloud) -> bytes:
    data = zipped(cloud)
    assert len(data) > 500_000
    return data


def publish(monkeypatch, files: dict[str, bytes]) -> None:
    """As if these files' md5 sums had been published."""
    monkeypatch.setattr(
        archive,
        "ARCHIVES",
        tuple(
            dataclasses.replace(
                a, files=tuple((p, hashlib.md5(files[p]).hexdigest() if p in files else md5) for p, md5 in a.files)
            )
            for a in ARCHIVES
        ),
    )


@pytest.fixture
def hub(cloud_zip, monkeypatch):
    monkeypatch.setattr(fetch, "_BLOCK", 100_000)
    monkeypatch.setattr(fetch, "_AHEAD", 2)
    monkeypatch.setattr(storage, "_pause", lambda seconds: None)
    files = {CLOUD: cloud_zip, **LCZ}
    publish(monkeypatch, files)
    with HubServer(files) as server, Proxy(server.address) as front, Proxy(server.address) as cdn:
        server.cdn = cdn.url
        server.front, server.behind = front, cdn
        monkeypatch.setattr(handles, "_process", None)  # of another test's hub
        monkeypatch.setenv("HF_ENDPOINT", front.url)
        monkeypatch.setenv("HF_TOKEN", "hf_hush")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def copernicus(monkeypatch, capsys):
    """Runs a command here: its output, once its exit code is as expected."""

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["copernicus", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        output = captured.out + captured.err
        assert ended.value.code == code, output
        assert "Traceback" not in output
        assert "hf_hush" not in output
        return output

    return run


# --- what should happen ---------------------------------------------------------------------------------------------


def test_every_task_has_an_archive_that_holds_its_folder():
    for task in TASKS.values():
        (found,) = archive.archives_of([task.name])
        assert task.directory.split("/")[0] == found.folder
    assert archive.archives_of(["aq_no2_s5p", "aq_no2_s5p-seasonal", "aq_o3_s5p"]) == [ARCHIVES[-1]]
    names = [name for a in ARCHIVES for name in a.tasks]
    assert len(names) == len(set(names)) == 15


def test_fetched_checked_unpacked_and_not_again(hub, copernicus, cloud, tmp_path):
    out = tmp_path / "new" / "bench"
    output = copernicus("data", "fetch", "cloud_s3", "lcz_s2", "--out", str(out))
    assert tree(out / "cloud_s3") == tree(cloud)
    lcz = next(a.folder for a in ARCHIVES if "lcz_s2" in a.tasks)
    assert tree(out / lcz) == {path.split("/")[1]: data for path, data in LCZ.items()}
    assert sorted(p.name for p in out.iterdir()) == ["cloud_s3", lcz]
    assert f"Next: copernicus data verify {out}" in output
    assert len(TASKS["cloud_s3"].open(out, "train")) == 3
    assert {token for path, token in hub.tokens if path.startswith("/datasets/")} == {"Bearer hf_hush"}
    assert {token for path, token in hub.tokens if path.startswith("/cdn/")} == {""}  # another server
    hub.front.clear()
    again = copernicus("data", "fetch", "cloud_s3", "--out", str(out))
    assert "cloud_s3: there already" in again
    assert not hub.front.requests
    assert "of revision" in copernicus("data", "fetch", "cloud_s3", "--out", str(out), "--revision", "main", code=2)


def test_a_kept_zip_is_taken_again(hub, copernicus, cloud, cloud_zip, tmp_path):
    copernicus("data", "fetch", "cloud_s3", "lcz_s2", "--out", str(tmp_path), "--keep")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cloud_s3", "cloud_s3.zip", "lcz_s1s2"]
    assert (tmp_path / "cloud_s3.zip").read_bytes() == cloud_zip
    shutil.rmtree(tmp_path / "cloud_s3")
    hub.behind.clear()
    copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path))
    assert hub.behind.sent() < 70_000  # of the zip only its directory
    assert tree(tmp_path / "cloud_s3") == tree(cloud)
    assert (tmp_path / "cloud_s3.zip").read_bytes() == cloud_zip  # it is the user's
    shutil.rmtree(tmp_path / "cloud_s3")
    for spoiled in (cloud_zip[:-1000] + bytes(1000), cloud_zip[:-1000]):
        (tmp_path / "cloud_s3.zip").write_bytes(spoiled)
        output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), code=2)
        assert "cloud_s3.zip is there, but it" in output
    assert "move it away" in copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), code=2)


def test_a_folder_unpacked_by_hand_is_left(hub, copernicus, cloud, tmp_path):
    shutil.copytree(cloud, tmp_path / "cloud_s3")
    output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path))
    assert "not by this command" in output
    assert not hub.front.requests


# --- what goes wrong on the way -------------------------------------------------------------------------------------


def test_goes_on_where_it_was_cut_off(hub, copernicus, cloud, cloud_zip, tmp_path):
    part = tmp_path / fetch.WORK / "cloud_s3" / "cloud_s3.zip.part"
    hub.behind.fail("cut", times=2)  # passes
    started = False

    def spoil(n: int) -> None:
        nonlocal started
        if n >= 300_000 and not started:
            started = True
            hub.behind.fail("reset")

    real = fetch._append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_append", lambda source, path, have, update: real(source, path, have, spoil))
        output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), code=1)
    assert "goes on where it stopped" in output
    assert not (tmp_path / "cloud_s3").exists()
    have = part.stat().st_size
    assert 300_000 <= have < len(cloud_zip)
    assert part.read_bytes() == cloud_zip[:have]
    hub.behind.heal()
    hub.behind.clear()
    output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path))
    assert "are there, going on" in output
    directory = 70_000  # the zip's own, read first, and what a buffer takes along
    blocks = [
        r for r in hub.behind.passed("GET") if int(r.range.split("=")[1].split("-")[0]) < len(cloud_zip) - directory
    ]
    assert min(int(r.range.split("=")[1].split("-")[0]) for r in blocks if r.range != "bytes=0-0") >= have
    assert tree(tmp_path / "cloud_s3") == tree(cloud)
    assert not (tmp_path / fetch.WORK).exists()


def test_a_changed_file_starts_anew(hub, copernicus, cloud, cloud_zip, tmp_path, monkeypatch):
    part = tmp_path / fetch.WORK / "cloud_s3" / "cloud_s3.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(cloud_zip[:250_000])
    part.with_suffix(".stamp").write_text(f'[{len(cloud_zip)}, "{"0" * 64}"]')  # of another file of the same size
    hub.behind.clear()
    output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path))
    assert "going on" not in output
    assert any(r.range == "bytes=0-99999" for r in hub.behind.requests)
    assert tree(tmp_path / "cloud_s3") == tree(cloud)


def test_a_file_that_changes_meanwhile(hub, copernicus, cloud_zip, tmp_path, monkeypatch):
    real = fetch._append
    later = cloud_zip[:-2] + struct.pack("<H", 5) + b"later"  # with a comment

    def change(source, path, have, update):
        hub.files[CLOUD] = later
        real(source, path, have, update)

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_append", change)
        copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), "--revision", "main", code=1)
    assert not (tmp_path / "cloud_s3").exists()
    copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), "--revision", "main", "--keep")
    assert (tmp_path / "cloud_s3.zip").read_bytes() == later


SCRIPT = """
import dataclasses, sys
from copernicus.datasets.bench import archive
from copernicus.platform import cli, fetch
archive.ARCHIVES = tuple(
    dataclasses.replace(a, files=((a.files[0][0], sys.argv.pop(1)),)) if "cloud_s3" in a.tasks else a
    for a in archive.ARCHIVES
)
fetch._BLOCK, fetch._AHEAD = 50_000, 1
cli.main()
"""


def test_killed_and_started_again(hub, cloud, cloud_zip, tmp_path):
    md5 = hashlib.md5(cloud_zip).hexdigest()
    command = [sys.executable, "-c", SCRIPT, md5, "data", "fetch", "cloud_s3", "--out", "bench"]
    part = tmp_path / "bench" / fetch.WORK / "cloud_s3" / "cloud_s3.zip.part"
    hub.behind.delay = 0.05
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (part.exists() and part.stat().st_size > 100_000):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert have < len(cloud_zip)
    hub.behind.delay = 0
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "are there, going on" in done.stdout
    assert tree(tmp_path / "bench" / "cloud_s3") == tree(cloud)
    assert [p.name for p in (tmp_path / "bench").iterdir()] == ["cloud_s3"]


def test_killed_while_unpacking(hub, copernicus, cloud, tmp_path, monkeypatch):
    """What lies in the hidden folder then is a part; nothing of it is in the end."""
    with monkeypatch.context() as patch:

        def die(path, into, folder, moved):
            (into / folder / "s3_olci").mkdir(parents=True)
            (into / folder / "s3_olci" / "half.tif").write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr(fetch, "unpack", die)
        copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), code=130)
    assert not (tmp_path / "cloud_s3").exists()
    hub.behind.clear()
    copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path))
    assert hub.behind.sent() < 70_000  # of the zip only its directory
    assert tree(tmp_path / "cloud_s3") == tree(cloud)


@pytest.mark.parametrize("which", ["md5", "sha256"])
def test_a_wrong_checksum(hub, copernicus, cloud, tmp_path, monkeypatch, which):
    if which == "md5":
        publish(monkeypatch, {CLOUD: b"another file"})
    else:
        hub.told[CLOUD] = hashlib.sha256(b"another file").hexdigest()
    output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), code=1)
    assert f"its {which} is" in output
    assert "It is deleted" in output
    assert [p for p in tmp_path.rglob("*.zip*") if p.suffix != ".stamp"] == []
    assert not (tmp_path / "cloud_s3").exists()
    if which == "md5":  # published for one revision alone
        copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path), "--revision", "main")
        assert tree(tmp_path / "cloud_s3") == tree(cloud)


def test_a_damaged_zip_of_which_no_checksum_is_known(hub, copernicus, cloud, cloud_zip, tmp_path):
    hub.told[CLOUD] = "of some other kind"
    hub.files[CLOUD] = cloud_zip[:2000] + bytes(50) + cloud_zip[2050:]
    arguments = ("data", "fetch", "cloud_s3", "--out", str(tmp_path), "--revision", "main")
    output = copernicus(*arguments, code=1)
    assert "not checked" in output
    assert "is damaged" in output
    assert not (tmp_path / "cloud_s3").exists()
    hub.files[CLOUD] = cloud_zip  # of the same size and, for all that is told, the same file
    copernicus(*arguments)
    assert tree(tmp_path / "cloud_s3") == tree(cloud)


def test_no_such_file_or_access(hub, copernicus, tmp_path):
    out = tmp_path / "bench"
    assert "eurosat_s2.zip" in copernicus("data", "fetch", "eurosat_s2", "--out", str(out), code=2)
    hub.front.fail("401")
    assert "HF_TOKEN" in copernicus("data", "fetch", "cloud_s3", "--out", str(out), code=2)
    assert not out.exists()


def test_nobody_answers(hub, copernicus, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(handles, "_process", None)
    output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path / "bench"), code=1)
    assert f"http://127.0.0.1:{port} did not give l1_cloud_s3/cloud_s3.zip" in output
    assert "HF_ENDPOINT" in output
    assert "goes on where it stopped" in output


def test_wrong_input(hub, copernicus, tmp_path):
    output = copernicus("data", "fetch", "eurosat_s3", "--out", str(tmp_path / "bench"), code=2)
    assert "eurosat_s2" in output
    (tmp_path / "file").touch()
    assert "is a file" in copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path / "file"), code=2)
    assert not (tmp_path / "bench").exists()


def test_too_little_room(hub, copernicus, cloud, cloud_zip, tmp_path, monkeypatch):
    needed = len(cloud_zip) + sum(-(-len(data) // 4096) * 4096 for data in tree(cloud).values())
    out = tmp_path / "bench"

    def free(bytes_: int):
        usage = shutil._ntuple_diskusage(10 * needed, 10 * needed - bytes_, bytes_)
        monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)

    free(needed - 1)
    output = copernicus("data", "fetch", "cloud_s3", "--out", str(out), code=2)
    assert f"{needed / 1e6:.1f} MB are needed" in output
    assert not out.exists()
    assert hub.behind.sent() < 100_000  # of the zip only its directory
    free(needed)
    copernicus("data", "fetch", "cloud_s3", "--out", str(out))


# --- zips -----------------------------------------------------------------------------------------------------------


def make_zip(*members: tuple[str, bytes], mode: int = 0) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return stream.getvalue()


def directory_at(data: bytes) -> int:
    """Of the first entry of a zip's central directory."""
    return data.index(b"PK\x01\x02")


def patched(data: bytes, at: int, layout: str, value: int) -> bytes:
    spoiled = bytearray(data)
    struct.pack_into(layout, spoiled, directory_at(data) + at, value)
    return bytes(spoiled)


SOUND = make_zip(("top/a.txt", b"a" * 5000), ("top/b/c.txt", b"c"))
WARN = pytest.mark.filterwarnings("ignore:Duplicate name")


@WARN
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (make_zip(("top/../../out.txt", b"x")), "leads out"),
        (make_zip(("../out.txt", b"x")), "leads out"),
        (make_zip(("/tmp/out.txt", b"x")), "leads out"),
        (make_zip(("top\\..\\out.txt", b"x")), "leads out"),
        (make_zip(("top/link", b"/etc/passwd"), mode=stat.S_IFLNK | 0o777), "link"),
        (make_zip(("top/pipe", b""), mode=stat.S_IFIFO | 0o777), "link or a device"),
        (make_zip(("top/a", b"x"), ("top/a", b"y")), "twice"),
        (make_zip(("top/a", b"x"), ("top/a/b", b"y")), "both a file and a folder"),
        (make_zip(("other/a", b"x")), "no files in a folder top/"),
        (b"no zip at all" * 100, "no zip"),
        (SOUND[:-30], "no zip"),
        (patched(SOUND, 8, "<H", 1), "password"),
        (patched(SOUND, 24, "<I", 100), "damaged"),  # inflates to more than is stated
        (patched(SOUND, 24, "<I", 6000), "size stated|damaged"),  # and to less
        (patched(SOUND, 16, "<I", 12345), "damaged"),  # its checksum
        (patched(SOUND, 20, "<I", 1 << 20), "overlap"),
    ],
)
def test_hostile_zips(tmp_path, data, said):
    path = tmp_path / "hostile" / "a.zip"
    path.parent.mkdir()
    path.write_bytes(data)
    into = tmp_path / "deep" / "into"
    with pytest.raises(ArchiveError, match=said):
        unpack(path, into, "top", lambda n: None)
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and into not in p.parents and p != path]
    assert outside == []
    assert sum(p.stat().st_size for p in into.rglob("*") if p.is_file()) <= 6000


def test_sound_zip(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(
        make_zip(("top/a.txt", b"a" * 5000), ("top/b/c.txt", b"c"), ("__MACOSX/a", b"mac"), ("top/d/", b""))
    )
    moved: list[int] = []
    found = unpack(path, tmp_path / "into", "top", moved.append)
    assert tree(tmp_path / "into") == {"top/a.txt": b"a" * 5000, "top/b/c.txt": b"c"}
    assert (found.size, found.taken, found.left_out) == (5001, 3 * 4096, ("__MACOSX/a",))
    assert moved[-1] == 5001
    with open(path, "rb") as file:
        assert contents(file, "top") == found or contents(file, "top").size == found.size


def test_a_hostile_zip_from_the_hub(hub, copernicus, tmp_path, monkeypatch):
    hub.files[CLOUD] = make_zip(("cloud_s3/../../out.txt", b"x"))
    publish(monkeypatch, hub.files)
    output = copernicus("data", "fetch", "cloud_s3", "--out", str(tmp_path / "bench"), code=1)
    assert "leads out of its folder" in output
    assert list(tmp_path.iterdir()) == []
