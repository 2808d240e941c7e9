"""Random damage to members and shards: a tensor that is found is the one torch reads from the same bytes; all else is
refused as PthError or named as Problem, by short reads and without another exception."""

import io
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pth import described, numbers, reader, refused, rezipped, saved
from test_tar import BLOCK, CONTENTS, change_header, tar_of

from copernicus.datasets.pth import PthError, locate_tensor, read_tensor
from copernicus.datasets.shards import Problem
from copernicus.datasets.tar import Member, Windows, walk

QUICK = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SLOW = settings(QUICK, max_examples=4000, derandomize=False, print_blob=True)


def fuzzed(**strategies: st.SearchStrategy) -> Callable:
    """The same property tried a little by default, and a lot under the mark ``slow``."""

    def both(function: Callable) -> Callable:
        effort = pytest.mark.parametrize(
            "effort", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["", "more"]
        )

        def test(effort: settings) -> None:
            effort(given(**strategies)(lambda **drawn: function(**drawn)))()

        test.__name__ = function.__name__
        return effort(test)

    return both


# Members.

FINE = saved(numbers((3, 4)))
MEMBERS = [
    FINE,
    saved(numbers((2, 5), torch.int16), pickle_protocol=4),
    saved(numbers((6, 5, 4), torch.uint8)[1:3].transpose(0, 1)),
    saved(numbers((4, 1), torch.int64).expand(4, 3)),
    rezipped(FINE, packing=zipfile.ZIP_DEFLATED),
    rezipped(FINE, wide=True, stream=True),
    described(first=2, shape=(2, 3), strides=(5, 1)),
]
EXPLAINED = (
    r"Unsupported operand 1[0-9][0-9]"
    r"|reading file (version|\.format_version|\.storage_alignment|\.data/serialization_id):"
    r"|\bversion\b|codec can't decode|invalid literal for int"
)
"""Why torch may refuse what is accepted here: an opcode of protocol 4, which its safe reader does not know; damage to an
entry of which the tensor has no need."""


def check_member(data: bytes) -> None:
    calls: list[tuple[int, int]] = []
    try:
        found = locate_tensor(reader(data, calls), 0, len(data))
    except PthError:
        refused(data)
        return
    finally:
        assert sum(length for _, length in calls) <= 1 << 16
    try:
        array = read_tensor(reader(data), 0, len(data))
    except PthError as error:
        assert re.search("checksum|inflate", str(error))  # noqa: PT017 (either way is right)
        array = None
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        assert re.search(EXPLAINED, str(error)), error  # noqa: PT017
        return
    expected = tensor.detach().numpy()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if array is not None:
        assert (array.dtype, array.shape, array.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    if not found.whole:
        assert data[found.offset : found.offset + expected.nbytes] == expected.tobytes()


@st.composite
def damaged(draw: st.DrawFn, goods: Sequence[bytes]) -> bytes:
    """One of the good ones after a few edits, some of which copy from another."""
    data = bytearray(draw(st.sampled_from(goods)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 2, 4, 8, 22, 64, BLOCK]))
        edit = draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "splice"]))
        if edit == "flip":
            data[at : at + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in data[at : at + 1])
        elif edit == "set":
            new = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(new)] = new
        elif edit == "cut":
            del data[at:]
        elif edit == "drop":
            del data[at : at + length]
        elif edit == "insert":
            data[at:at] = draw(st.sampled_from([b"\0", b"\xff", b"P"])) * length
        else:
            other = draw(st.sampled_from(goods))
            start = draw(st.integers(0, len(other)))
            data[at : at + length] = other[start : start + length]
    return bytes(data)


KNOWN = {(a.dtype.str, a.shape, a.tobytes()) for a in (read_tensor(reader(data), 0, len(data)) for data in MEMBERS)}


@fuzzed(data=damaged(MEMBERS))
def test_damaged_members(data):
    check_member(data)
    try:
        array = read_tensor(reader(data), 0, len(data))
    except PthError:
        return
    assert (array.dtype.str, array.shape, array.tobytes()) in KNOWN


def pickle_of(member: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(member)) as file:
        return file.read("archive/data.pkl")


def tokens(code: bytes) -> list[bytes]:
    """A pickle cut into its opcodes with their arguments."""
    starts = [at for _, _, at in pickletools.genops(code) if at is not None]
    return [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]


PICKLES = [pickle_of(member) for member in MEMBERS]
WORDS = sorted(
    {token for code in PICKLES for token in tokens(code)}
    | {bytes([code]) + argument for code in range(256) for argument in (b"", b"\0", b"\1\0\0\0", b"a\nb\n")}
    | {b"cos\nsystem\n", b"ctorch\nDoubleStorage\n", b"ctorch\nBoolStorage\n", b"X\x04\0\0\0data", b"J\xff\xff\xff\xff"}
    | {b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x01\xff", b"K\xff", b"M\xff\xff", b"\x88", b"h\0", b"h\7"}
)


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """The opcodes of a good pickle, some of them dropped, doubled, exchanged or replaced."""
    words = tokens(draw(st.sampled_from(PICKLES)))
    for _ in range(draw(st.integers(1, 3))):
        at, other = (draw(st.integers(0, len(words) - 1)) for _ in range(2))
        edit = draw(st.sampled_from(["drop", "double", "exchange", "replace", "insert", "move"]))
        if edit == "drop" and len(words) > 1:
            del words[at]
        elif edit == "double":
            words.insert(at, words[at])
        elif edit == "exchange":
            words[at], words[other] = words[other], words[at]
        elif edit == "replace":
            words[at] = draw(st.sampled_from(WORDS))
        elif edit == "insert":
            words.insert(at, draw(st.sampled_from(WORDS)))
        else:
            words.insert(other, words.pop(at))
    return b"".join(words)


@fuzzed(
    code=st.one_of(
        programs(), damaged(PICKLES), st.lists(st.sampled_from(WORDS)).map(lambda words: b"\x80\2" + b"".join(words))
    )
)
def test_pickles_of_random_opcodes(code):
    check_member(rezipped(FINE, {"data.pkl": code}))


@fuzzed(
    count=st.sampled_from([6, 12, 24]),
    first=st.integers(-1, 13),
    shape=st.lists(st.integers(-1, 6), max_size=4).map(tuple),
    strides=st.lists(st.integers(-1, 6), max_size=4).map(tuple),
    kind=st.sampled_from([torch.FloatStorage, torch.DoubleStorage, torch.ShortStorage]),
    gradient=st.booleans(),
)
def test_random_figures(**parts):
    check_member(described(**parts))


# Shards.

FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = {f"{'k' * 130}.json": b"long"}
SHARDS = [
    tar_of(CONTENTS | (LONG if form != tarfile.USTAR_FORMAT else {}), form).rstrip(b"\0") + bytes(1024)
    for form in FORMS
]


def check_shard(data: bytes) -> None:
    calls: list[tuple[int, int]] = []
    found = list(walk(reader(data, calls), len(data), "a.tar"))
    assert found == list(walk(Windows(reader(data), len(data)).read, len(data), "a.tar"))
    assert len(calls) <= len(data) / BLOCK + 3
    assert sum(length for _, length in calls) <= 2 * len(data) + BLOCK
    end = 0
    seen = set()
    for item in found:
        if isinstance(item, Member):
            assert end + BLOCK <= item.offset <= item.offset + item.size <= len(data)
            assert f"{item.key}.{item.extension}".isprintable()
            assert (item.key, item.extension) not in seen
            seen.add((item.key, item.extension))
            end = item.offset + item.size
        else:
            assert str(item).isprintable()
    problems = [item for item in found if isinstance(item, Problem)]
    last = [problem for problem in problems if problem.reason in ("truncated_tar", "damaged_tar")]
    assert last == [item for item in found[-1:] if isinstance(item, Problem) and item.reason.endswith("_tar")]
    assert {problem.reason for problem in problems if problem not in last} <= {"stray_member", "duplicate_member"}


@fuzzed(data=damaged(SHARDS))
def test_damaged_shards(data):
    check_shard(data)


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """Shards of which some blocks are headers with fields of ill will and a right checksum."""
    data = draw(st.sampled_from(SHARDS))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) // BLOCK - 1)) * BLOCK
        octal = st.integers(0, 1 << 33).map(lambda size: b"%011o\0" % size)
        near = st.integers(0, 4000).map(lambda size: b"%011o\0" % size)
        fields = st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from([bytes([kind]) for kind in b"\0001234567xgXLKSDMNVZ"]),
                "size": st.one_of(octal, near, st.binary(min_size=12, max_size=12)),
                "name": st.binary(min_size=1, max_size=100),
                "magic": st.sampled_from([b"ustar\00000", b"ustar  \0", b"\0" * 8]),
            },
        )
        data = change_header(data, at, **draw(fields))
    return data


@fuzzed(data=forged())
def test_forged_shards(data):
    check_shard(data)
