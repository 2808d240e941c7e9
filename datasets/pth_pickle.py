"""The pickle of a tensor, read without running it.

A pickle is a program that may call anything. The one that torch.save writes for a tensor has about 40 opcodes and says

    torch._utils._rebuild_tensor_v2(
        persistent_id(("storage", torch.FloatStorage, key, "cpu", count)), first, shape, strides, requires_grad, OrderedDict()
    )

The interpreter here knows these opcodes and these names, and makes a description of them. The first other one ends it.

Sources: Python's pickletools (opcodes); ``_rebuild_tensor_v2`` of torch/_utils.py and ``persistent_id`` of
torch/serialization.py (the program, the same from torch 1.6 to 2.13).
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from copernicus.datasets.pth_zip import PthError, shown

_MOST_OPCODES = 1000
_MOST_AXES = 32
_MOST = 1 << 62  # of any number
_LONGEST_NAMES = 512  # of a module and what is asked of it

_REFUSED = {
    "torch._utils _rebuild_parameter": "a torch.nn.Parameter, not a plain tensor",
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_nested_tensor": "a nested tensor",
    "torch._utils _rebuild_qtensor": "a quantised tensor",
    "torch._utils _rebuild_meta_tensor_no_storage": "a meta tensor, which has no numbers",
    "torch._utils _rebuild_tensor_v3": "numbers of a type that is not read (unsigned beyond 8 bits, or 8-bit floats)",
    "torch._tensor _rebuild_from_type_v2": "a tensor with attributes or of a class of its own, not a plain tensor",
    "torch BoolStorage": "bool numbers, which are not read",
    "torch BFloat16Storage": "bfloat16 numbers, which are not read",
    "torch ComplexFloatStorage": "complex64 numbers, which are not read",
    "torch ComplexDoubleStorage": "complex128 numbers, which are not read",
}
_FOREIGN = {
    "}": "a dict",
    "]": "a list",
    "\x8f": "a set",
    "G": "a float",
    "C": "bytes",
    "N": "None",
}  # by their opcodes


@dataclass(frozen=True)
class Layout:
    """What the pickle says: ``count`` numbers in the storage ``key``, of which the tensor shows some."""

    dtype: np.dtype
    key: str
    count: int
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    @property
    def contiguous(self) -> bool:
        expected = 1
        for n, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n > 1 and step != expected:
                return False
            expected *= n
        return True


@dataclass(frozen=True)
class _Global:
    """A name the pickle asks for: one of those below or, with a dtype, a type of storage."""

    dtype: np.dtype | None = None


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    count: int


_REBUILD, _ORDERED_DICT, _NO_HOOKS = _Global(), _Global(), object()
_GLOBALS = {
    "torch._utils _rebuild_tensor_v2": _REBUILD,
    "collections OrderedDict": _ORDERED_DICT,
    "torch ByteStorage": _Global(np.dtype("<u1")),
    "torch CharStorage": _Global(np.dtype("<i1")),
    "torch ShortStorage": _Global(np.dtype("<i2")),
    "torch IntStorage": _Global(np.dtype("<i4")),
    "torch LongStorage": _Global(np.dtype("<i8")),
    "torch HalfStorage": _Global(np.dtype("<f2")),
    "torch FloatStorage": _Global(np.dtype("<f4")),
    "torch DoubleStorage": _Global(np.dtype("<f8")),
}


def _global(module: Any, name: Any) -> _Global:
    full = f"{module} {name}" if type(module) is str and type(name) is str else ""
    if full in _GLOBALS:
        return _GLOBALS[full]
    if full in _REFUSED:
        raise PthError(f"holds {_REFUSED[full]}")
    asked = shown(full.replace(" ", ".")) or "something without a name"
    raise PthError(f"its pickle asks for {asked}; nothing was run")


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:  # True is an int too
        raise PthError("its pickle has something else, or an absurd number, where one from 0 on belongs")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > _MOST_AXES:
        raise PthError(f"its pickle has something else where up to {_MOST_AXES} numbers belong")
    return tuple(map(_number, value))


def _stored(value: Any) -> _Storage:
    """What a persistent id means."""
    if type(value) is not tuple or len(value) != 5:
        raise PthError("its pickle asks for something stored that is no storage of numbers")
    word, kind, key, place, count = value
    if word != "storage" or type(kind) is not _Global or kind.dtype is None:
        raise PthError("its pickle asks for something stored that is no storage of numbers")
    if type(key) is not str or not re.fullmatch(r"[0-9]{1,20}", key):  # a count; in torch 1.6 an address in memory
        raise PthError("its pickle names its storage otherwise than torch.save does")
    if type(place) is not str or not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", place):
        device = shown(place) if type(place) is str else "no device"
        raise PthError(f"its numbers were saved from {device}, not from cpu or cuda")
    return _Storage(kind.dtype, key, _number(count))


def _reduced(function: Any, arguments: Any) -> object:
    """What a call gives, of the two that are known."""
    if function is _ORDERED_DICT and type(arguments) is tuple and not arguments:
        return _NO_HOOKS
    if function is not _REBUILD:
        raise PthError("its pickle calls something that is no part of a tensor; nothing was run")
    if type(arguments) is not tuple or len(arguments) != 6:
        raise PthError("its pickle does not describe a tensor in six parts")
    storage, first, shape, strides, gradient, hooks = arguments
    if type(storage) is not _Storage or type(gradient) is not bool or hooks is not _NO_HOOKS:
        raise PthError("its pickle describes no plain tensor")
    if gradient and storage.dtype.kind != "f":
        raise PthError(f"its pickle wants a gradient of {storage.dtype} numbers")
    layout = Layout(storage.dtype, storage.key, storage.count, _number(first), _numbers(shape), _numbers(strides))
    if len(layout.shape) != len(layout.strides):
        raise PthError(f"its pickle gives {len(layout.strides)} strides for {len(layout.shape)} axes")
    return layout


def _text(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise PthError(f"its pickle holds the text {shown(data)!r}, no part of a tensor") from None


def _foreign(opcode: int) -> str:
    name = chr(opcode)
    if name in _FOREIGN:
        return f"holds {_FOREIGN[name]}, not just one tensor"
    known = next((known.name for known in pickletools.opcodes if known.code == name), f"the unknown opcode {opcode:#x}")
    return f"its pickle uses {known}, no part of a tensor"


def followed(code: bytes) -> Layout:
    """What a pickle describes, followed on paper.

    Raises:
        PthError: it is no plain tensor of an allowed type, or asks for anything else; nothing was run.
    """
    try:
        value = _steps(code)
    except (IndexError, KeyError, ValueError):  # cut off, or takes from an empty stack, or recalls what it never noted
        raise PthError("its pickle is damaged") from None
    if type(value) is not Layout:
        kind = "an OrderedDict" if value is _NO_HOOKS else f"a {type(value).__name__.strip('_').lower()}"
        raise PthError(f"holds {kind}, not one tensor")
    return value


def _steps(code: bytes) -> Any:
    if code[0] != 0x80 or not 2 <= code[1] <= 5:
        raise PthError("its pickle is not of protocol 2 to 5")
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[int, Any] = {}
    at = 2
    for _ in range(_MOST_OPCODES):
        opcode = code[at]
        at += 1
        if opcode == 0x71:  # BINPUT
            memo[code[at]] = stack[-1]
            at += 1
        elif opcode == 0x4B:  # BININT1
            stack.append(code[at])
            at += 1
        elif opcode == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif opcode == 0x58 or opcode == 0x8C:  # BINUNICODE, SHORT_BINUNICODE
            start = at + (4 if opcode == 0x58 else 1)
            at = start + int.from_bytes(code[at:start], "little")
            stack.append(_text(code[start:at]))
        elif opcode == 0x4D:  # BININT2
            stack.append(code[at] | code[at + 1] << 8)
            at += 2
        elif opcode == 0x4A:  # BININT
            stack.append(int.from_bytes(code[at : at + 4], "little", signed=True))
            at += 4
        elif opcode == 0x8A:  # LONG1
            start = at + 1
            at = start + code[at]
            stack.append(int.from_bytes(code[start:at], "little", signed=True))
        elif opcode == 0x85:  # TUPLE1
            stack.append((stack.pop(),))
        elif opcode == 0x86:  # TUPLE2
            stack.append((stack.pop(), stack.pop())[::-1])
        elif opcode == 0x87:  # TUPLE3
            stack.append((stack.pop(), stack.pop(), stack.pop())[::-1])
        elif opcode == 0x28:  # MARK
            below.append(stack)
            stack = []
        elif opcode == 0x74:  # TUPLE
            items, stack = stack, below.pop()
            stack.append(tuple(items))
        elif opcode == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif opcode == 0x63:  # GLOBAL
            module, name = code[at : at + _LONGEST_NAMES].split(b"\n", 2)[:2]
            at += len(module) + len(name) + 2
            stack.append(_global(_text(module), _text(name)))
        elif opcode == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            stack.append(_global(stack.pop(), name))
        elif opcode == 0x51:  # BINPERSID
            stack.append(_stored(stack.pop()))
        elif opcode == 0x52:  # REDUCE
            arguments = stack.pop()
            stack.append(_reduced(stack.pop(), arguments))
        elif opcode == 0x88 or opcode == 0x89:  # NEWTRUE, NEWFALSE
            stack.append(opcode == 0x88)
        elif opcode == 0x68:  # BINGET
            stack.append(memo[code[at]])
            at += 1
        elif opcode == 0x95:  # FRAME: how far to read ahead
            at += 8
        elif opcode == 0x2E:  # STOP
            if below or len(stack) != 1 or at != len(code):
                raise PthError("its pickle ends with something left over")
            return stack[0]
        else:
            raise PthError(_foreign(opcode))
    raise PthError(f"its pickle goes on after {_MOST_OPCODES} opcodes; a tensor takes about 40")
