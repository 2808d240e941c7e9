"""What commands say, and how: a console, one line of complaint."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    # Off a terminal a fixed width keeps tables and links whole in logs.
    return Console(width=None if sys.stdout.isatty() else 160)


def complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escape(message)}", highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def numbers(pairs: list[str]) -> dict[str, int]:
    """["depth=4"] -> {"depth": 4}"""
    from copernicus.datasets.sensors import InputError

    numbers = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not value.isdecimal():
            raise InputError(f"{pair!r}: write name=number, as in depth=4")
        numbers[key] = int(value)
    return numbers
