"""Members that were damaged or forged: refused in one line, nothing run, nothing large held in memory."""

import io
import itertools
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_pth import Described, Stored, check, described, numbers, pickled, reader, refused, rezipped, saved

from copernicus.datasets.pth import PthError, locate_tensor, read_tensor

GOOD = saved(numbers((3, 4)))


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


# Pickles that ask for more.


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_the_payload_would_work(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "created")))
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", ["alone", "as hooks", "as storage", "as key", "in a dict", "before the tensor"])
def test_a_payload_never_runs(tmp_path, protocol, place):
    payload = Payload(tmp_path / "created")
    tensor = [Stored("storage", torch.FloatStorage, "0", "cpu", 12), 0, (3, 4), (4, 1), False, OrderedDict()]
    rebuild = torch._utils._rebuild_tensor_v2
    if place == "as hooks":
        tensor[5] = payload
    elif place == "as storage":
        tensor[0] = payload
    elif place == "as key":
        tensor[0] = Stored("storage", torch.FloatStorage, payload, "cpu", 12)
    value = {
        "alone": payload,
        "in a dict": {"a": Described(rebuild, *tensor), "b": payload},
        "before the tensor": (payload, Described(rebuild, *tensor)),
    }.get(place, Described(rebuild, *tensor))
    try:
        code = pickled(value, protocol)
    except pickle.PicklingError:
        assert protocol == 0  # which knows persistent ids of text alone
        return
    error = refused(rezipped(GOOD, {"data.pkl": code}))
    assert error.reason == "unsafe_or_broken_pth"
    if protocol >= 2 and place != "in a dict":
        assert "posix.system; nothing was run" in str(error)
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "name",
    ["torch.load", "torch._utils._rebuild_tensor", "builtins.eval", "torch.FloatTensor", "collections.OrderedDict.x"],
)
def test_any_other_name_is_refused(name):
    module, _, attribute = name.rpartition(".")
    code = f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1")
    assert f"asks for {name}; nothing was run" in str(refused(rezipped(GOOD, {"data.pkl": code})))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"", "damaged"),
        (b"\x80", "damaged"),
        (b"\x80\x02", "damaged"),
        (b"\x80\x02.", "left over"),
        (b"\x80\x06K\x01.", "protocol"),
        (b"\x80\x02K\x01K\x01.", "left over"),
        (b"\x80\x02(K\x01.", "left over"),
        (b"\x80\x02K\x01.K\x01", "left over"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02\x86.", "damaged"),
        (b"\x80\x02K\x01\x86.", "damaged"),
        (b"\x80\x02(K\x01\x86t.", "damaged"),  # not across a mark
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02q\x00.", "damaged"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02)Q.", "stored"),
        (b"\x80\x02))R.", "calls something"),
        (b"\x80\x02K\x01K\x01R.", "calls something"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01R.", "calls something"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "six parts"),
        (b"\x80\x02ctorch\nFloatStorage\n.", "not one tensor"),
        (b"\x80\x02c\n\n.", "nothing was run"),
        (b"\x80\x02cos\nsyst", "asks for os.syst"),
        (b"\x80\x02cos", "damaged"),
        (b"\x80\x02c" + b"a" * 100_000 + b"\nb\n.", "damaged"),
        (b"\x80\x02cos\n\xe9vil\n.", "text"),
        (b"\x80\x02X\xff\xff\xff\xffabc", "damaged"),
        (b"\x80\x02X\x03\x00\x00\x00\x1b[0.", "str"),
        (b"\x80\x02" + b"(" * 2000, "goes on"),
        (b"\x80\x02" + b"K\x01" * 500_000, "goes on"),
        (b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", "int"),
        (b"\x80\x02b.", "BUILD"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02\xff.", "unknown opcode 0xff"),
        (b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 300 + b".", "tuple"),  # 2^300 numbers, if one were to spell it out
        (
            b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000)"
            + b"q\x00h\x00\x86" * 200
            + b"K\x0ctQ.",
            "no device",
        ),
    ],
)
def test_pickles_that_are_no_tensor(code, message):
    with memory_below(4 << 20):
        assert message in str(refused(rezipped(GOOD, {"data.pkl": code})))


@pytest.mark.parametrize(
    "parts",
    [
        {"word": "module"},
        {"kind": "FloatStorage"},
        {"kind": OrderedDict},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": ""},
        {"key": 0},
        {"key": "٣"},
        {"place": "meta"},
        {"place": "cuda:0\n"},
        {"place": 0},
        {"count": 11},
        {"count": 13},
        {"count": -12},
        {"count": 12.0},
        {"count": True},
        {"count": 10**12},
        {"count": 2**70},
        {"kind": torch.DoubleStorage},
        {"first": 1},
        {"first": -1},
        {"first": 2**61},
        {"first": 2**70},
        {"first": False},
        {"shape": (3, 5)},
        {"shape": (4, 4)},
        {"shape": (-3, 4)},
        {"shape": (10**12,), "strides": (1,)},
        {"shape": (10**12,), "strides": (0,)},
        {"shape": (2**40, 2**40), "strides": (0, 0)},
        {"shape": (2**61,) * 32, "strides": (0,) * 32},
        {"shape": (1,) * 33, "strides": (1,) * 33},
        {"shape": (3, 4, 1)},
        {"shape": [3, 4]},
        {"shape": 12, "strides": 1},
        {"strides": (4, 2)},
        {"strides": (4, -1)},
        {"strides": (2**61, 1)},
        {"strides": (4,)},
        {"gradient": 1},
        {"gradient": None},
        {"hooks": ()},
        {"hooks": OrderedDict(a=1)},
    ],
    ids=str,
)
def test_figures_that_do_not_fit_are_refused(parts):
    check(described(), numbers((3, 4)))
    with memory_below(4 << 20):
        refused(described(**parts))


def test_odd_strides_of_single_numbers_are_harmless():
    check(described(shape=(1, 12), strides=(2**61, 1)), numbers((1, 12)))


# Zips.


def test_every_cut_is_refused():
    for data in (GOOD, rezipped(GOOD), rezipped(GOOD, packing=zipfile.ZIP_DEFLATED, stream=True)):
        for length in range(len(data)):
            assert refused(data[:length]).reason == "unsafe_or_broken_pth"


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_changed_byte_changes_nothing_or_is_refused(packing):
    expected = numbers((3, 4)).numpy().tobytes()
    for data in (GOOD, rezipped(GOOD, packing=packing, wide=True), rezipped(GOOD, packing=packing, stream=True)):
        good = locate_tensor(reader(data), 0, len(data))
        for at, other in itertools.product(range(len(data)), (0x01, 0x80, 0xFF)):
            changed = bytearray(data)
            changed[at] ^= other
            try:
                found = locate_tensor(reader(bytes(changed)), 0, len(data))
            except PthError:
                continue
            assert found == good
            try:
                array = read_tensor(reader(bytes(changed)), 0, len(data))
            except PthError:  # a number was changed, or its checksum
                continue
            assert array.tobytes() == expected


def test_changed_numbers_do_not_match_the_checksum():
    at = locate_tensor(reader(GOOD), 0, len(GOOD)).offset
    for bit in range(8 * 48):
        changed = bytearray(GOOD)
        changed[at + bit // 8] ^= 1 << bit % 8
        with pytest.raises(PthError, match="data/0 does not match its checksum"):
            read_tensor(reader(bytes(changed)), 0, len(GOOD))


def test_older_and_other_files_are_named():
    assert "before 1.6" in str(refused(saved(numbers((3, 4)), _use_new_zipfile_serialization=False)))
    assert "bare pickle" in str(refused(pickle.dumps([1])))
    assert "not a zip" in str(refused(b"\x93NUMPY" * 100))
    assert "empty" in str(refused(b""))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as other:
        other.writestr("notes.txt", "hello")
    assert "0 data.pkl" in str(refused(out.getvalue()))


def test_a_big_endian_file_is_refused():
    assert "'big'" in str(refused(rezipped(GOOD, {"byteorder": b"big"})))


def test_a_zip_that_others_read_otherwise_is_refused():
    def twice(first: str, second: str) -> bytes:
        out = io.BytesIO(GOOD)
        with (
            zipfile.ZipFile(out, "a") as added,
            pytest.warns(match="Duplicate name") if first == second else memory_below(1 << 30),
        ):
            added.writestr(second, b"other")
        return out.getvalue()

    assert "two entries" in str(refused(twice("archive/data.pkl", "archive/data.pkl")))
    assert "two entries" in str(refused(twice("archive/data.pkl", "archive/DATA.PKL")))
    assert "more than one folder" in str(refused(twice("archive/data.pkl", "other/version")))
    assert "2 data.pkl" in str(refused(twice("archive/data.pkl", "other/data.pkl")))
    commented = io.BytesIO(GOOD)
    with zipfile.ZipFile(commented, "a") as changed:
        changed.comment = GOOD[-200:]
    refused(commented.getvalue())
    refused(b"front" + GOOD)
    refused(GOOD[:4] + b"front" + GOOD)
    refused(GOOD + b"behind")


def entries(data: bytes) -> dict[str, int]:
    """Where the directory's entry of each name stands."""
    (start,) = struct.unpack("<I", data[-6:-2])
    found = {}
    while data[start : start + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<3H", data, start + 28)
        found[data[start + 46 : start + 46 + lengths[0]].decode()] = start
        start += 46 + sum(lengths)
    return found


FIELDS = {
    "flags": (8, 6, "<H"),
    "method": (10, 8, "<H"),
    "crc": (16, 14, "<I"),
    "stored": (20, 18, "<I"),
    "size": (24, 22, "<I"),
}


def forged(data: bytes, entry: str, both: bool = True, **fields: int) -> bytes:
    """Fields of an entry changed in the directory and in its own header."""
    changed = bytearray(data)
    at = entries(data)[entry]
    (header,) = struct.unpack_from("<I", data, at + 42)
    for name, value in fields.items():
        central, local, form = FIELDS[name]
        struct.pack_into(form, changed, at + central, value)
        if both:
            struct.pack_into(form, changed, header + local, value)
    return bytes(changed)


PLAIN = rezipped(GOOD)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flags": 1}, "encrypted"),
        ({"flags": 1 << 6}, "encrypted"),
        ({"flags": 1 << 13}, "encrypted"),
        ({"method": 9}, "encrypted or packed"),
        ({"method": 14}, "encrypted or packed"),
        ({"method": 8}, "inflate"),
        ({"size": 47}, "47 bytes, but 48 are stored"),
        ({"stored": 47}, "48 bytes, but 47 are stored"),
        ({"size": 0xFFFFFFFF}, "are stored"),
        ({"size": 47, "stored": 47}, "bytes of them"),
        ({"size": 49, "stored": 49}, "overlaps"),
        ({"size": 0xFFFFFFFF, "stored": 0xFFFFFFFF}, "overlaps"),
        ({"crc": 0}, "checksum"),
    ],
)
def test_forged_entries_of_the_numbers(fields, message):
    with pytest.raises(PthError, match=message):
        read_tensor(reader(forged(PLAIN, "archive/data/0", **fields)), 0, len(PLAIN))
    with pytest.raises(PthError):
        read_tensor(reader(forged(PLAIN, "archive/data/0", both=False, **fields)), 0, len(PLAIN))


def test_numbers_that_are_marked_as_a_folder_are_refused():
    """torch takes no bytes for such an entry and gives a tensor of whatever is in memory."""
    changed = bytearray(PLAIN)
    changed[entries(PLAIN)["archive/data/0"] + 38] |= 1 << 4
    assert "folder" in str(refused(bytes(changed)))


def test_an_entry_that_points_at_another_is_refused():
    at = entries(PLAIN)
    for other in ("archive/version", "archive/data.pkl"):
        changed = bytearray(PLAIN)
        changed[at["archive/data/0"] + 42 : at["archive/data/0"] + 46] = PLAIN[at[other] + 42 : at[other] + 46]
        refused(bytes(changed))
    for offset in (len(PLAIN), 0x7FFFFFFF, 0xFFFFFFFE):
        changed[at["archive/data/0"] + 42 : at["archive/data/0"] + 46] = struct.pack("<I", offset)
        refused(bytes(changed))


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def bomb(entry: str, content: bytes, size: int) -> bytes:
    """A good zip of which one entry is deflated ``content`` that is announced as ``size`` bytes."""
    packed = deflated(content)
    data = rezipped(GOOD, {entry.removeprefix("archive/"): packed})
    return forged(data, entry, method=8, size=size, crc=zlib.crc32(content[:size]))


def test_the_bombs_of_these_tests_are_good_but_for_their_size():
    content = numbers((3, 4)).numpy().tobytes()
    check(bomb("archive/data/0", content, 48), numbers((3, 4)))


@pytest.mark.parametrize("announced", [0, 47, 49, 4800, 1 << 29, (1 << 32) - 2])
@pytest.mark.parametrize("entry", ["archive/data.pkl", "archive/data/0", "archive/byteorder"])
def test_what_inflates_to_something_else_than_announced_is_refused(entry, announced):
    data = bomb(entry, bytes(20 << 20), announced)
    with memory_below(8 << 20):
        refused(data)


def test_a_storage_that_is_announced_in_agreement_but_is_a_bomb():
    """The pickle, the directory and the header agree on a size; the content goes on after it, or ends before."""
    for inflated in (1 << 19, 1 << 25):
        count = 1 << 20
        packed = deflated(bytes(inflated))
        described_ = described(count=count, shape=(count,), strides=(1,))
        with zipfile.ZipFile(io.BytesIO(described_)) as file:
            code = file.read("archive/data.pkl")
        data = rezipped(GOOD, {"data.pkl": code, "data/0": packed})
        data = forged(data, "archive/data/0", method=8, size=4 * count, crc=zlib.crc32(bytes(4 * count)))
        assert locate_tensor(reader(data), 0, len(data)).whole == "compressed"
        with memory_below(12 << 20), pytest.raises(PthError, match="does not inflate"):
            read_tensor(reader(data), 0, len(data))


def test_a_storage_beyond_what_may_inflate_is_refused_without_inflating():
    count = 1 << 29
    with zipfile.ZipFile(io.BytesIO(described(count=count, shape=(count,), strides=(1,)))) as file:
        code = file.read("archive/data.pkl")
    data = rezipped(GOOD, {"data.pkl": code, "data/0": deflated(bytes(1000))})
    data = forged(data, "archive/data/0", method=8, size=4 * count)
    with memory_below(1 << 20):
        assert "at most" in str(refused(data))


def test_bytes_behind_a_deflated_content_are_refused():
    content = numbers((3, 4)).numpy().tobytes()
    data = rezipped(GOOD, {"data/0": deflated(content) + b"more"})
    data = forged(data, "archive/data/0", method=8, size=48, crc=zlib.crc32(content))
    with pytest.raises(PthError, match="does not inflate"):
        read_tensor(reader(data), 0, len(data))


def test_a_directory_of_many_entries_is_not_read():
    out = io.BytesIO(GOOD)
    with zipfile.ZipFile(out, "a") as many:
        for i in range(2000):
            many.writestr(f"archive/data/{i + 1}", b"")
    calls: list[tuple[int, int]] = []
    with pytest.raises(PthError, match="directory is"):
        locate_tensor(reader(out.getvalue(), calls), 0, len(out.getvalue()))
    assert sum(length for _, length in calls) <= 2048


def test_the_ends_of_the_directory_must_agree():
    end = len(GOOD) - 22
    assert GOOD[end - 20 : end - 16] == b"PK\6\7"
    for at in [*range(end - 76, end), *range(end, len(GOOD))]:
        changed = bytearray(GOOD)
        changed[at] ^= 0x40
        try:
            assert locate_tensor(reader(bytes(changed)), 0, len(GOOD)).shape == (3, 4)
        except PthError:
            continue
        # Versions of the program that wrote it, and the number of disks in all.
        assert end - 76 + 12 <= at < end - 76 + 16 or end - 4 <= at < end, at - end


def test_repeated_numbers_are_bounded():
    check(described(shape=(1 << 20,), strides=(0,)), numbers((3, 4))[0, :1].expand(1 << 20))
    refused(described(shape=((1 << 24) + 1,), strides=(0,)))
