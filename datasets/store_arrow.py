"""S3 and Google Cloud Storage through pyarrow."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from pyarrow import fs

from copernicus.datasets.stores import CONNECT_S, SILENCE_S, Handle, Place, Refused, split_options


def _s3(place: Place) -> Any:
    options = dict(place.options)
    endpoint = options.get("endpoint_override") or place.endpoint
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        # Left to itself the SDK would ask this machine's metadata service, which elsewhere costs seconds.
        region = "us-east-1" if endpoint else fs.resolve_s3_region(place.host)
    return fs.S3FileSystem(
        anonymous=place.anonymous,
        region=region,
        endpoint_override=endpoint or None,
        scheme=options.get("scheme") or ("http" if endpoint.startswith("http://") else "https"),
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        allow_delayed_open=True,  # a small file is then put in one request
    )


def _gcs(place: Place) -> Any:
    scheme, _, address = place.endpoint.rpartition("://")
    return fs.GcsFileSystem(
        anonymous=place.anonymous or bool(address),  # an emulator knows no accounts
        scheme=scheme or ("http" if address else None),
        endpoint_override=address or None,
        retry_time_limit=timedelta(seconds=1),
    )


_FINAL = re.compile(r"ACCOUNT|ACCESS_?KEY|CREDENTIAL|EXPIRED|INVALID|MALFORMED|SIGNATURE|TOKEN|UNRECOGNIZED|METHOD_NOT")


@contextlib.contextmanager
def _arrow_errors() -> Iterator[None]:
    """pyarrow raises OSError for nearly everything; its message has the store's error code or the HTTP status. (Where the
    body of an error is longer than the range that was asked for it says INTERNAL_FAILURE: asked again, a new handle's
    HEAD tells what is wrong.)"""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, NotImplementedError) as error:
        raise Refused(str(error)) from error
    except OSError as error:
        said = str(error)
        code = re.search(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?", said)
        name, status = (code[1], int(code[2] or 0)) if code else ("", 0)
        if status == 404 or "NOT_FOUND" in name or "NO_SUCH" in name:
            raise FileNotFoundError(said) from error
        if status == 403 or name == "ACCESS_DENIED":
            raise PermissionError(said) from error
        if (300 <= status < 500 and status not in (408, 429)) or _FINAL.search(name):
            raise Refused(said) from error
        raise


class _ArrowHandle:
    def __init__(self, filesystem: Any, path: str):
        self._fs, self._path = filesystem, path
        self._file: Any = None
        with _arrow_errors():
            if filesystem.type_name == "gcs":
                # An open file there begins to fetch the whole object, whatever is read of it: not for a stamp.
                info = filesystem.get_file_info(path)
                if not info.is_file:
                    raise FileNotFoundError("no such object")
                self.size, self.version = info.size, str(info.mtime_ns)
            else:
                self._file = filesystem.open_input_file(path)
                said = self._file.metadata()
                self.size = self._file.size()
                self.version = (said.get("ETag") or said.get("Last-Modified") or b"").decode().strip('"')

    def read(self, offset: int, length: int) -> bytearray:
        # Asked for n bytes, pyarrow's S3 file says that it read n even if fewer came (a proxy's fault, or the object was
        # replaced by a shorter one) and leaves the rest of the buffer as it was. A body fills it from the front: the
        # last byte still being what we put there, for two different values, means that it was never written. No float
        # that we store ends in these, nor an int16 or a JSON file, so the second request is rare.
        for mark in (0xA5, 0x5A):
            data = bytearray(length)
            data[-1] = mark
            with _arrow_errors():
                if self._file is None:
                    self._file = self._fs.open_input_file(self._path)
                # A segment is read on its own: threads share the file, not a position in it.
                count = self._file.get_stream(offset, length).readinto(data)
            if count < length:
                return data[:count]
            if data[-1] != mark:
                return data
        return bytearray()


class ArrowStore:
    lists = True

    def __init__(self, place: Place):
        self._fs = _s3(place) if place.scheme == "s3" else _gcs(place)

    def _path(self, uri: str) -> str:
        return split_options(uri)[0].partition("://")[2].removeprefix("anonymous@")

    def open(self, uri: str) -> Handle:
        return _ArrowHandle(self._fs, self._path(uri))

    def put(self, uri: str, data: bytes) -> None:
        with _arrow_errors(), self._fs.open_output_stream(self._path(uri)) as stream:
            stream.write(data)

    def list(self, folder: str) -> dict[str, bool]:
        try:
            with _arrow_errors():
                found = self._fs.get_file_info(fs.FileSelector(self._path(folder).rstrip("/"), allow_not_found=True))
        except FileNotFoundError:  # the bucket
            return {}
        return {info.base_name: info.type == fs.FileType.Directory for info in found}
