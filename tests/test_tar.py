"""Tars by their headers: compared with the standard library's reading of the same file, then broken in every way."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from copernicus.datasets.pth import locate_tensor
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import Problem
from copernicus.datasets.tar import Member, Windows, list_members, walk

BLOCK = 512


def tar_of(contents: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def walked(data: bytes) -> tuple[list[Member], list[Problem]]:
    found = list(walk(reader(data), len(data), "a.tar"))
    return [f for f in found if isinstance(f, Member)], [f for f in found if isinstance(f, Problem)]


def reader(data: bytes, calls: list[tuple[int, int]] | None = None):
    def read(offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > len(data):
            raise OSError(f"{length} bytes at {offset} of {len(data)}")
        if calls is not None:
            calls.append((offset, length))
        return data[offset : offset + length]

    return read


def contents_of(members: list[Member], data: bytes) -> dict[str, bytes]:
    return {f"{m.key}.{m.extension}": data[m.offset : m.offset + m.size] for m in members}


def change_header(data: bytes, at: int, **fields: bytes) -> bytes:
    """A header rewritten in place, its checksum right again."""
    where = {"name": 0, "size": 124, "type": 156, "magic": 257}
    header = bytearray(data[at : at + BLOCK])
    for field, value in fields.items():
        header[where[field] : where[field] + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + BLOCK :]


CONTENTS = {
    "0000001.s1_grd.pth": bytes(range(256)) * 5,
    "0000001.json": b"{}",
    "0000002.dem.pth": b"x" * 512,
    "0000002.empty": b"",
    "0000002.json": b"[1]",
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(form):
    long = {f"a folder/{'of some length/' * 12}0000003.dem.pth": b"long", "Übung/Grüße.json": b"utf8"}
    if form == tarfile.USTAR_FORMAT:
        long = {"a folder/0000003.dem.pth": b"long", f"{'f' * 120}/{'k' * 60}.json": b"prefix"}
    data = tar_of(CONTENTS | long, form)
    members, problems = walked(data)
    assert problems == []
    assert contents_of(members, data) == CONTENTS | long
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.offset, m.size) for m in members] == [(i.offset_data, i.size) for i in tar]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar command")
@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "posix"])
def test_members_that_the_tar_command_wrote(tmp_path, form):
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {"0000001.dem.pth": b"d" * 1000, "0000001.json": b"{}"}
    if form in ("gnu", "posix"):
        contents[f"{'k' * 200}.json"] = b"long"
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    subprocess.run(["tar", f"--format={form}", "-cf", "out.tar", "folder"], cwd=tmp_path, check=True)
    data = (tmp_path / "out.tar").read_bytes()
    members, problems = walked(data)
    assert problems == []
    assert contents_of(members, data) == {f"folder/{name}": content for name, content in contents.items()}


def test_the_key_ends_at_the_first_dot_of_the_base_name():
    members, problems = walked(tar_of({"v1.2/0000001.s1_grd.pth": b"1", "./0000001.json": b"2"}))
    assert [(m.key, m.extension) for m in members] == [("v1.2/0000001", "s1_grd.pth"), ("./0000001", "json")]
    assert problems == []


def test_links_devices_and_names_without_a_key_are_passed_over_by_name():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind in (
            ("a.folder", tarfile.DIRTYPE),
            ("a.link", tarfile.SYMTYPE),
            ("a.hard", tarfile.LNKTYPE),
            ("a.pipe", tarfile.FIFOTYPE),
            ("a.device", tarfile.CHRTYPE),
            ("a.unknown", b"Z"),
            ("README", tarfile.REGTYPE),
            (".hidden", tarfile.REGTYPE),
            ("dot.", tarfile.REGTYPE),
            ("two\nlines.json", tarfile.REGTYPE),
            ("surrogate\udcff.json", tarfile.REGTYPE),
            ("a.json", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    members, problems = walked(file.getvalue())
    assert [(m.key, m.extension) for m in members] == [("a", "json")]
    assert {p.reason for p in problems} == {"stray_member"}
    wheres = [p.where.removeprefix("a.tar:") for p in problems]
    assert wheres[:5] == ["a.link", "a.hard", "a.pipe", "a.device", "a.unknown"]
    assert wheres[5:8] == ["README", ".hidden", "dot."]
    assert wheres[8:] == ["two\\nlines.json", "surrogate\\udcff.json"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar command")
@pytest.mark.parametrize("form", [["gnu"], ["posix", "--sparse-version=1.0"], ["posix", "--sparse-version=0.0"]])
def test_a_sparse_file_is_passed_over_and_the_next_is_found(tmp_path, form):
    with open(tmp_path / "holes.pth", "wb") as file:
        for i in range(60):  # more holes than the header's own map has room for
            file.seek(i * 65536)
            file.write(b"data")
        file.truncate(1 << 23)
    (tmp_path / "next.json").write_bytes(b"{}")
    (_, *more), form = form, form[0]
    subprocess.run(
        ["tar", "--sparse", f"--format={form}", *more, "-cf", "out.tar", "holes.pth", "next.json"],
        cwd=tmp_path,
        check=True,
    )
    data = (tmp_path / "out.tar").read_bytes()
    members, problems = walked(data)
    assert len(data) < 1 << 20, "nothing sparse was written"
    assert contents_of(members, data) == {"next.json": b"{}"}
    assert [p.reason for p in problems] == ["stray_member"]
    assert "holes.pth" in problems[0].where


def test_of_two_members_of_one_name_the_first_is_used():
    data = tar_of({"a.json": b"first"})[: 2 * BLOCK] + tar_of({"a.json": b"second", "b.json": b""})
    members, problems = walked(data)
    assert contents_of(members, data) == {"a.json": b"first", "b.json": b""}
    assert [(p.where, p.reason) for p in problems] == [("a.tar:a.json", "duplicate_member")]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_is_reported_and_what_is_whole_is_kept(form):
    data = tar_of(CONTENTS | ({} if form == tarfile.USTAR_FORMAT else {"k" * 300 + ".json": b"long"}), form)
    whole, _ = walked(data)
    end = data.rstrip(b"\0")
    last = whole[-1].offset + BLOCK
    assert len(end) <= last
    for length in sorted({*range(0, last + 1, BLOCK), *range(BLOCK // 2, last, BLOCK), *(m.offset for m in whole)}):
        members, problems = walked(data[:length])
        assert [(p.where, p.reason) for p in problems] == [("a.tar", "truncated_tar")], length
        assert f"byte {length}" in problems[0].detail
        assert f"after {len(members)} members" in problems[0].detail
        # One without content is whole once its header is there.
        assert members == [m for m in whole if m.offset + m.size <= length], length
    for length in range(last + BLOCK, len(data), BLOCK):  # one block of zeros is end enough
        assert walked(data[:length]) == (whole, [])


def test_a_cut_member_is_named():
    members, problems = walked(tar_of(CONTENTS)[:1000])
    assert members == []
    assert "0000001.s1_grd.pth" in problems[0].detail


def test_a_damaged_header_ends_the_walk_after_what_is_in_front_of_it():
    data = tar_of(CONTENTS)
    whole, _ = walked(data)
    for index, member in enumerate(whole):
        at = member.offset - BLOCK
        for damage in (b"\xff" * 100, b"garbage"):
            members, problems = walked(data[:at] + damage + data[at + len(damage) :])
            assert members == whole[:index]
            assert [(p.where, p.reason) for p in problems] == [("a.tar", "damaged_tar")]
            assert (f"byte {at}" if at else "not a tar") in problems[0].detail


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (b"\xff" * 12, "damaged_tar"),  # -1
        (b"\xff" * 10 + b"\xfa\x00", "damaged_tar"),  # -1536: back to the header in front
        (b"-0000001000\0", "damaged_tar"),
        (b"\x80" + b"\xff" * 11, "truncated_tar"),
        (b"77777777777\0", "truncated_tar"),
        (b"0000000000x\0", "damaged_tar"),
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K"])
def test_a_forged_size_ends_the_walk(size, reason, kind):
    data = tar_of(CONTENTS)
    whole, _ = walked(data)
    members, problems = walked(change_header(data, whole[1].offset - BLOCK, size=size, type=kind))
    assert members == whole[:1]
    extended = kind != b"0" and reason == "truncated_tar"  # refused before anything is fetched
    assert [p.reason for p in problems] == ["damaged_tar" if extended else reason]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"13 size=1000\n", None),
        (b"9 size=x\n", "damaged_tar"),
        (b"10 size=-9\n", "damaged_tar"),
        (b"30 size=1000000000000000000000\n", "damaged_tar"),
        (b"17 size=99999999\n", "truncated_tar"),
        (b"0 size=1000\n", "damaged_tar"),
        (b"4 path", "damaged_tar"),
        (b"99 path=a.b\n", "damaged_tar"),
        (b"1" * 100_000, "damaged_tar"),
        (b"12 path=a.b\n" * 50_000, None),
        (b"15 path=\xff\xfe.bin\n", "stray_member"),
        (b"1012 path=" + b"a" * 999 + b".b\n", "stray_member"),
    ],
)
def test_forged_pax_records(body, reason):
    header = tar_of({"pax": body})
    header = change_header(header, 0, type=b"x")[: BLOCK + -(-len(body) // BLOCK) * BLOCK]
    data = header + tar_of({"one.json": b"1" * 1000, "two.json": b"2"})
    members, problems = walked(data)
    assert [p.reason for p in problems] == ([reason] if reason else [])
    if reason in (None, "stray_member"):
        assert members[-1].key == "two"
        assert len(members) == (1 if reason else 2)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_that_only_announce_do_not_go_on_for_ever(kind):
    body = b"a.b" if kind in b"LK" else b"12 path=a.b\n"
    header = change_header(tar_of({"pax": body}), 0, type=kind)[: 2 * BLOCK]
    members, problems = walked(header * 20_000 + tar_of({"one.json": b""}))
    assert (len(members), problems) == (1, [])
    members, problems = walked(header * 200)
    assert (members, problems[0].reason) == ([], "truncated_tar")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_member_that_is_announced_and_does_not_come_is_reported(kind):
    body = b"a.b" if kind in b"LK" else b"12 path=a.b\n"
    header = change_header(tar_of({"pax": body}), 0, type=kind)[: 2 * BLOCK]
    members, problems = walked(tar_of({"one.json": b""})[:BLOCK] + header + bytes(2 * BLOCK))
    assert len(members) == 1
    assert [p.reason for p in problems] == ["damaged_tar"]


def test_the_number_of_headers_is_bounded(monkeypatch):
    monkeypatch.setattr("copernicus.datasets.tar._MOST_HEADERS", 1000)
    header = change_header(tar_of({"a.folder/": b""})[:BLOCK], 0, type=b"5")
    assert walked(header * 999 + tar_of({})) == ([], [])
    members, problems = walked(header * 1001 + tar_of({}))
    assert (members, [p.reason for p in problems]) == ([], ["damaged_tar"])


def test_what_follows_the_end_of_the_archive_is_reported():
    first, second = tar_of({"a.json": b"1"}), tar_of({"b.json": b"2"})
    members, problems = walked(first + second)
    assert [m.key for m in members] == ["a"]
    assert [(p.where, p.reason) for p in problems] == [("a.tar", "damaged_tar")]
    _, problems = walked(first + bytes(3 << 20))
    assert "3155456 bytes follow" in problems[0].detail or problems[0].reason == "damaged_tar"
    assert walked(first + bytes(1 << 19))[1] == []  # padding


@pytest.mark.parametrize(("data", "reason"), [(b"<html>404</html>" * 100, "damaged_tar"), (b"", "truncated_tar")])
def test_what_is_no_tar(data, reason):
    members, problems = walked(data)
    assert (members, [p.reason for p in problems]) == ([], [reason])


def test_an_error_of_reading_is_not_taken_for_a_damaged_file():
    data = tar_of(CONTENTS)

    def read(offset: int, length: int) -> bytes:
        if offset > 1000:
            raise OSError("connection reset")
        return data[offset : offset + length]

    with pytest.raises(OSError, match="connection reset"):
        list(walk(read, len(data), "a.tar"))


def test_list_members_of_a_file(tmp_path):
    path = tmp_path / "a.tar"
    data = tar_of(CONTENTS)
    path.write_bytes(data)
    members, problems = list_members(path)
    assert problems == []
    found = {
        f"{key}.{extension}": data[offset : offset + size]
        for key, extensions in members.items()
        for extension, (offset, size) in extensions.items()
    }
    assert found == CONTENTS
    path.write_bytes(data[:1000])
    members, problems = list_members(path)
    assert members == {}
    assert [(p.where, p.reason) for p in problems] == [(str(path), "truncated_tar")]
    with pytest.raises(InputError, match=r"missing\.tar cannot be read: No such file"):
        list_members(tmp_path / "missing.tar")
    with pytest.raises(InputError, match="directory"):
        list_members(tmp_path)


# Few requests.


def big_shard(path: Path, grids: int) -> dict[str, tuple[int, ...]]:
    """Members of the published sizes, two patches a grid; what is written of the numbers are holes in the file."""
    shapes = {
        "s1_grd": (2, 4, 2, 264, 264),
        "s2_toa": (2, 4, 13, 264, 264),
        "s3_olci": (8, 21, 96, 96),
        **{f"s5p_{gas}": (12, 1, 28, 28) for gas in ("co", "no2", "o3", "so2")},
        "dem": (960, 960),
    }
    names: dict[str, tuple[int, ...]] = {}
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        saved = {}
        for name, shape in shapes.items():
            buffer = io.BytesIO()
            torch.save(torch.zeros(shape, dtype=torch.int16 if name == "s2_toa" else torch.float32), buffer)
            saved[f"{name}.pth"] = buffer.getvalue()
        saved["json"] = b'{"s1_grd": []}'.ljust(7000)
        for grid in range(grids):
            for extension in sorted(saved):
                info = tarfile.TarInfo(f"{grid:07d}.{extension}")
                info.size = len(saved[extension])
                tar.addfile(info, io.BytesIO(saved[extension]))
                names[info.name] = shapes.get(extension.removesuffix(".pth"), ())
    return names


def test_requests_and_bytes_for_each_member_are_few(tmp_path):
    names = big_shard(tmp_path / "a.tar", 3)
    size = (tmp_path / "a.tar").stat().st_size
    calls: list[tuple[int, int]] = []
    with open(tmp_path / "a.tar", "rb") as file:

        def read(offset: int, length: int) -> bytes:
            calls.append((offset, length))
            data = os.pread(file.fileno(), length, offset)
            assert len(data) == length
            return data

        windows = Windows(read, size)
        found: dict[str, tuple[int, ...]] = {}
        for member in walk(windows.read, size, "a.tar"):
            assert isinstance(member, Member)
            before = len(calls)
            if member.extension == "json":
                assert windows.read(member.offset, member.size).startswith(b'{"s1_grd"')
                shape: tuple[int, ...] = ()
            else:
                shape = locate_tensor(windows.read, member.offset, member.size).shape
            assert len(calls) == before, "a member that was just walked past was not at hand"
            found[f"{member.key}.{member.extension}"] = shape
    assert found == names
    assert len(calls) <= 1.2 * len(names)
    assert sum(length for _, length in calls) <= 30_000 * len(names)
    assert max(length for _, length in calls) <= 24 << 10


def test_windows_give_the_bytes_of_the_file():
    data = bytes(range(256)) * 500
    windows = Windows(reader(data), len(data))
    for offset in [0, 1, 70_000, 69_000, 127_999, 3000, 70_000, 128_000]:
        for length in [0, 1, 512, 20_000, 60_000]:
            if offset + length <= len(data):
                assert windows.read(offset, length) == data[offset : offset + length]
            else:
                with pytest.raises(OSError, match="in a file of"):
                    windows.read(offset, length)
    with pytest.raises(OSError, match="in a file of"):
        windows.read(-1, 1)


def test_a_read_beyond_a_window_asks_for_what_is_wanted_alone():
    data = bytes(1 << 20)
    calls: list[tuple[int, int]] = []
    windows = Windows(reader(data, calls), len(data))
    windows.read(100_000, 500_000)
    assert calls == [(100_000, 500_000)]
