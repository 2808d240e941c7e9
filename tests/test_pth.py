"""Tensors found in what torch.save wrote: compared with torch's own reading of the same bytes."""

import io
import itertools
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2
from torch.utils.serialization import config

from copernicus.datasets.pth import PthError, TensorAt, locate_tensor, read_tensor

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
]
SHAPES = [(1,), (7,), (300,), (70_000,), (3, 4), (2, 1, 5), (1, 1, 1), (2, 3, 4, 5), (2, 4, 2, 9, 8), (1,) * 20 + (2,)]


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random bytes as numbers: every one of them possible, NaN included."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def reader(data: bytes, calls: list[tuple[int, int]] | None = None) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > len(data):
            raise OSError(f"{length} bytes at {offset} of {len(data)}")
        if calls is not None:
            calls.append((offset, length))
        return data[offset : offset + length]

    return read


def located(data: bytes) -> tuple[TensorAt, np.ndarray, np.ndarray | None]:
    """What is found of a member within a larger file: where, the tensor read whole, and by its slice if that can be."""
    front = b"PK\3\4 something else " * 30
    file = front + data + b"PK\5\6 the next member" * 90
    found = locate_tensor(reader(file), len(front), len(data))
    whole = read_tensor(reader(file), len(front), len(data))
    if found.whole:
        return found, whole, None
    flat = np.frombuffer(file, found.dtype, int(np.prod(found.shape)), found.offset)
    return found, whole, flat.reshape(found.shape)


def check(data: bytes, expected: torch.Tensor) -> TensorAt:
    found, whole, piece = located(data)
    array = expected.detach().numpy()
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert (whole.dtype, whole.shape, whole.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert whole.flags.c_contiguous
    assert whole.flags.writeable
    if piece is not None:
        assert piece.tobytes() == array.tobytes()
    return found


def refused(data: bytes) -> PthError:
    """The one refusal of both functions."""
    errors = []
    for function in (locate_tensor, read_tensor):
        with pytest.raises(PthError) as error:
            function(reader(data), 0, len(data))
        errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    assert len(str(errors[0]).splitlines()) == 1
    assert str(errors[0]).isascii()
    assert str(errors[0]).isprintable()
    return errors[0]


def rezipped(
    data: bytes,
    change: Mapping[str, bytes | None] | None = None,
    packing: int = zipfile.ZIP_STORED,
    wide: bool = False,
    stream: bool = False,
) -> bytes:
    """The same entries (some changed, or left out: None) in a zip as Python's zipfile writes it."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return not stream

        def seek(self, *where: int) -> int:
            if stream:
                raise io.UnsupportedOperation
            return super().seek(*where)

        def tell(self) -> int:
            if stream:
                raise io.UnsupportedOperation
            return super().tell()

    out = Stream()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        contents = {info.filename: old.read(info) for info in old.infolist()}
        folder = next(iter(contents)).split("/")[0]
        contents |= {f"{folder}/{name}": content for name, content in (change or {}).items()}
        for name, content in contents.items():
            if content is not None:
                info = zipfile.ZipInfo(name)
                info.compress_type = packing
                with new.open(info, "w", force_zip64=wide) as file:
                    file.write(content)
    return out.getvalue()


class Described:
    """Pickles as whatever call it is given."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Stored:
    """Pickles as a persistent id."""

    def __init__(self, *words: Any):
        self.words = words


def pickled(value: object, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return item.words if isinstance(item, Stored) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def described(**parts: Any) -> bytes:
    """A float tensor of 12 numbers, some parts of its description replaced."""
    given = {
        "word": "storage",
        "kind": torch.FloatStorage,
        "key": "0",
        "place": "cpu",
        "count": 12,
        "first": 0,
        "shape": (3, 4),
        "strides": (4, 1),
        "gradient": False,
        "hooks": OrderedDict(),
    } | parts
    storage = Stored(*(given[name] for name in ("word", "kind", "key", "place", "count")))
    rest = [given[name] for name in ("first", "shape", "strides", "gradient", "hooks")]
    return rezipped(saved(numbers((3, 4))), {"data.pkl": pickled(Described(_rebuild_tensor_v2, storage, *rest))})


# What torch writes.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_are_where_torch_puts_them(dtype, shape):
    tensor = numbers(shape, dtype)
    data = saved(tensor)
    assert torch.load(io.BytesIO(data), weights_only=True).shape == shape
    assert check(data, tensor).whole == ""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(protocol):
    for shape in SHAPES:
        check(saved(numbers(shape, torch.int16), pickle_protocol=protocol), numbers(shape, torch.int16))


@pytest.mark.parametrize(
    ("view", "whole"),
    [
        (lambda x: x[5:], ""),
        (lambda x: x[5, 3], ""),
        (lambda x: x[5, 3, 2:4], ""),
        (lambda x: x[3:4].transpose(0, 2)[..., 0, :1], ""),  # one number, odd strides
        (lambda x: x.reshape(6, 1, 5, 4).expand(6, 1, 5, 4), ""),
        (lambda x: x.transpose(0, 1), "not contiguous"),
        (lambda x: x.permute(2, 0, 1), "not contiguous"),
        (lambda x: x[..., ::2], "not contiguous"),
        (lambda x: x[::2, 1:3], "not contiguous"),
        (lambda x: x[:, :1].expand(6, 7, 4), "not contiguous"),
        (lambda x: x[0, 0, :1].expand(300), "not contiguous"),
        (lambda x: torch.as_strided(x, (5, 6), (3, 2), 7), "not contiguous"),
    ],
)
def test_views_are_what_they_show(view, whole):
    for dtype in (torch.int16, torch.float64):
        tensor = view(numbers((6, 5, 4), dtype))
        data = saved(tensor)
        assert torch.equal(torch.load(io.BytesIO(data), weights_only=True).isnan(), tensor.isnan())
        assert check(data, tensor).whole == whole


def test_gradients_and_devices_matter_not():
    check(saved(torch.ones(3, 4, requires_grad=True)), torch.ones(3, 4))
    check(described(place="cuda:0"), numbers((3, 4)))
    check(described(place="cuda"), numbers((3, 4)))


def test_names_and_alignments_that_put_the_headers_elsewhere(tmp_path):
    tensor = numbers((3, 4))
    name = f"{'long' * 40}.s1_grd.pth"
    torch.save(tensor, tmp_path / name)
    assert check((tmp_path / name).read_bytes(), tensor).whole == ""
    with config.patch({"save.storage_alignment": 4096}):
        data = saved(tensor)
    assert check(data, tensor).offset > 4096


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("wide", [False, True], ids=["", "zip64"])
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_zips_of_another_hand(packing, wide, stream):
    for tensor in (numbers((3, 4), torch.int16), torch.zeros(200, 300), torch.zeros(20, 3).T):
        data = rezipped(saved(tensor), packing=packing, wide=wide, stream=stream)
        assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), tensor)
        whole = "compressed" if packing else "" if tensor.is_contiguous() else "not contiguous"
        assert check(data, tensor).whole == whole


def test_what_older_torch_wrote():
    """Of 1.6, where the storage is named by its address and nothing but ``version`` follows."""
    tensor = numbers((3, 4))
    newer = (".format_version", ".storage_alignment", "byteorder", ".data/serialization_id", "data/0")
    address = "94743456019536"
    older = dict.fromkeys(newer) | {f"data/{address}": tensor.numpy().tobytes()}
    data = rezipped(described(key=address), older)
    assert torch.load(io.BytesIO(data), weights_only=True).shape == (3, 4)
    check(data, tensor)


class Sparse(io.RawIOBase):
    """A file on disk that takes writes; blocks of zeros become holes."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")  # noqa: SIM115 (closed with this)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), 1 << 20):
            piece = bytes(view[start : start + (1 << 20)])
            if len(piece) == 1 << 20 and piece.count(0) == len(piece):
                self.file.seek(len(piece), os.SEEK_CUR)
            else:
                self.file.write(piece)
        return len(view)

    def close(self) -> None:
        self.file.close()


@pytest.mark.slow
def test_more_than_four_gigabytes_as_torch_writes_them(tmp_path):
    tensor = torch.zeros((1 << 32) + (1 << 20), dtype=torch.uint8)
    tensor[-3:] = torch.tensor([1, 2, 3])
    sparse = Sparse(tmp_path / "big.pth")
    torch.save(tensor, sparse)
    sparse.close()
    size = (tmp_path / "big.pth").stat().st_size
    with open(tmp_path / "big.pth", "rb") as file:
        found = locate_tensor(lambda offset, length: os.pread(file.fileno(), length, offset), 0, size)
        assert found.shape == tuple(tensor.shape)
        assert found.whole == ""
        assert os.pread(file.fileno(), 8, found.offset + len(tensor) - 5) == b"\0\0\1\2\3PK\7"


# What is fetched.


def test_the_numbers_are_not_read():
    data = saved(torch.zeros(1000, 1000))
    calls: list[tuple[int, int]] = []
    locate_tensor(reader(data, calls), 0, len(data))
    assert len(calls) == 2
    assert sum(length for _, length in calls) <= 2048
    calls.clear()
    read_tensor(reader(data, calls), 0, len(data))
    assert len(calls) == 3
    assert sum(length for _, length in calls) <= 4_000_000 + 2048


def test_an_error_of_reading_is_not_taken_for_a_damaged_file():
    data = saved(torch.zeros(100, 100))
    for broken in (0, 1, 2):
        calls = itertools.count()

        def read(offset: int, length: int, calls=calls, broken=broken) -> bytes:
            if next(calls) == broken:
                raise OSError("connection reset")
            return data[offset : offset + length]

        with pytest.raises(OSError, match="connection reset"):
            read_tensor(read, 0, len(data))


# What is refused; test_pth_hostile.py has more.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.zeros(2, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, dtype=torch.complex128).conj(), "complex128"),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, "dict"),  # its note that the sign is turned
        (torch.zeros(2, dtype=torch.uint16), "type that is not read"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "type that is not read"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.nn.Parameter(torch.zeros(2)), "Parameter"),
        (torch.nn.Buffer(torch.zeros(2)), "class of its own"),
        ({"image": torch.zeros(2)}, "dict"),
        (OrderedDict(image=torch.zeros(2)), "SETITEM"),
        (OrderedDict(), "OrderedDict"),
        ([torch.zeros(2)], "list"),
        ((torch.zeros(2), torch.zeros(2)), "tuple"),
        ({1, 2}, "set"),
        (3, "int"),
        (3.5, "float"),
        ("text", "str"),
        (None, "None"),
        (np.zeros(3), "_reconstruct"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.float32, "torch.float32"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_by_name(value, message):
    error = refused(saved(value))
    assert error.reason == "unsafe_or_broken_pth"
    assert message in str(error)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4)])
def test_a_tensor_without_axes_or_numbers_has_the_wrong_shape(shape):
    assert refused(saved(torch.zeros(shape))).reason == "wrong_shape"
