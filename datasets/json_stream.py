"""A gzipped JSON object, one entry at a time: the list of all raw images is 2 GB of text."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from copernicus.datasets.sensors import InputError

_PIECE = 1 << 20  # characters read at a time
_LARGEST_FILE = 16 << 30  # characters
_LARGEST_VALUE = 16 << 20  # characters


def read_entries(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Keys, values and the values' text of the object in a ``.json.gz`` file, in its order.

    Raises:
        InputError: the file cannot be opened, is not gzip or cut off, is no JSON object, or beyond all bounds.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = _Text(file)
            if text.sign() != "{":
                raise ValueError("it is not a JSON object")
            if text.peek() == "}":
                return
            while True:
                key, _ = text.value()
                if not isinstance(key, str) or text.sign() != ":":
                    raise ValueError(f"no key and colon where an entry should begin (after {key!r:.40})")
                yield key, *text.value()
                if (sign := text.sign()) == "}":
                    return
                if sign != ",":
                    raise ValueError(f"no comma after entry {key!r:.40}")
    except InputError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: cannot be read as gzip ({reason}); is the file there, and whole?") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: is not a JSON object of grids ({error}); fetch it again") from None


class _Text:
    """What of a file is read and not yet used."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.at = file, "", 0
        self.total, self.ended = 0, False

    def _more(self) -> None:
        piece = self.file.read(_PIECE)
        self.total += len(piece)
        if self.total > _LARGEST_FILE:
            raise ValueError(f"more than {_LARGEST_FILE >> 30} GiB of text")
        self.text, self.at, self.ended = self.text[self.at :] + piece, 0, not piece

    def peek(self) -> str:
        """The next character that is not space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def sign(self) -> str:
        """As `peek`, and goes past it."""
        sign = self.peek()
        self.at += len(sign)
        return sign

    def value(self) -> tuple[Any, str]:
        """The next JSON value and its text."""
        while True:
            self.peek()
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except ValueError:  # wrong, or not all of it read yet
                if self.ended or len(self.text) - self.at > _LARGEST_VALUE:
                    raise
                self._more()
                continue
            text, self.at = self.text[self.at : end], end
            return value, text
