"""From what a user writes (brace patterns, folders, globs, lists) to the shards it names, local and remote."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from copernicus.datasets import stores
from copernicus.datasets.handles import store_of
from copernicus.datasets.sensors import InputError
from copernicus.datasets.storage import StoreError, list_folder, local_path, stamps


def expand(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """Shards from brace patterns (``example-{000000..000009}.tar``), folders (their ``*.tar``), globs, or a list of
    these, local or on a store; in the order given, a folder's and a glob's sorted. Local paths become absolute.

    On a store each folder is listed once, whatever the number of shards in it.

    Raises:
        InputError: a file that does not exist, a folder or a glob without shards, a shard named twice, or a store that
            denies access.
        StoreError: a store that does not answer.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    names: list[str] = []
    for pattern in [spec] if isinstance(spec, (str, Path)) else spec:
        try:
            names += braceexpand(str(pattern))
        except UnbalancedBracesError:
            raise InputError(f"shards {str(pattern)!r}: unbalanced braces") from None
    try:
        remote = _Remote([name for name in names if stores.scheme_of(name)])
        shards = [shard for name in names for shard in (remote.shards if stores.scheme_of(name) else _local)(name)]
    except PermissionError as error:
        raise InputError(f"shards {error}") from None
    except StoreError as error:
        if error.tries > 1:  # it may answer later: not the user's fault
            raise
        raise InputError(f"shards {error}") from None
    if not shards:
        raise InputError("no shards given")
    repeated = sorted(shard for shard, times in Counter(shards).items() if times > 1)
    if repeated:
        raise InputError(f"shard {repeated[0]} is named twice")
    return shards


def _local(name: str) -> list[str]:
    path = local_path(name)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        inside = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        return _some(inside, f"folder {path} holds no shards (*.tar)")
    if glob.has_magic(path):
        return _some(sorted(glob.glob(path)), f"no shard matches {path}")
    raise InputError(f"shard {path} does not exist")


def _some(shards: list[str], otherwise: str) -> list[str]:
    if not shards:
        raise InputError(otherwise)
    return shards


class _Remote:
    """What stores hold of some names. Names that share a folder are looked up in one listing of it; a name alone in its
    folder, or in one that cannot be listed, is asked for itself, several at a time."""

    def __init__(self, names: Sequence[str]):
        self._listings: dict[str, dict[str, bool]] = {}
        folders: dict[str, list[str]] = {}
        for name in names:
            base, options = stores.split_options(name)
            if not (_is_folder(base) or _is_glob(base)):
                folders.setdefault(base.rpartition("/")[0] + options, []).append(name)
        single: list[str] = []
        for folder, inside in folders.items():
            if len(inside) == 1 or not self._can_list(folder):
                single += inside
        self._single = dict(zip(single, stamps(single), strict=True))

    def _can_list(self, folder: str) -> bool:
        if not store_of(folder).lists:
            return False
        try:
            self._list(folder)
        except PermissionError:  # reading may be allowed all the same
            return False
        return True

    def _list(self, folder: str) -> dict[str, bool]:
        if folder not in self._listings:
            self._listings[folder] = list_folder(folder)
        return self._listings[folder]

    def shards(self, name: str) -> list[str]:
        base, options = stores.split_options(name)
        if _is_glob(base):
            return _some(self._glob(base, options), f"no shard matches {base}")
        folder, _, last = base.rpartition("/")
        known = self._listings.get(folder + options)
        if self._single.get(name) is not None or (known is not None and known.get(last) is False):
            return [name]
        base = base.rstrip("/")
        inside = self._list(base + options) if store_of(name).lists else {}
        if not inside:
            raise InputError(f"shard {stores.shown(base)} does not exist")
        return _some(self._glob(f"{base}/*.tar", options), f"folder {base} holds no shards (*.tar)")

    def _glob(self, base: str, options: str) -> list[str]:
        parts = base.split("/")
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        found = ["/".join(parts[:fixed])]
        for i, part in enumerate(parts[fixed:], fixed):
            wants_folder = i < len(parts) - 1
            found = [
                f"{folder}/{name}"
                for folder in found
                for name, is_folder in sorted(self._list(folder + options).items())
                if is_folder == wants_folder
                and fnmatchcase(name, part)
                and name.startswith(".") == part.startswith(".")
            ]
        return [name + options for name in found]


def _is_folder(base: str) -> bool:
    return base.endswith("/") or "/" not in base.partition("://")[2]


def _is_glob(base: str) -> bool:
    """In an http URL only the star: a question mark begins the query."""
    return "*" in base if base.startswith("http") else glob.has_magic(base)
