"""Byte ranges over HTTP, from the Hugging Face hub's API, from a Google Cloud Storage emulator and through fsspec."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from hub_server import HubServer
from object_store import Proxy

from copernicus.datasets import handles, storage
from copernicus.datasets.expand import expand
from copernicus.datasets.sensors import InputError
from copernicus.datasets.storage import StoreError, list_folder, open_file, read_bytes, stamps, write_bytes

DATA = np.random.default_rng(0).bytes(2_000_000)
RANGES = [(1_500_000, 700), (0, 3000), (3010, 3000), (800_000, 5)]
EXPECTED = [DATA[o : o + n] for o, n in RANGES]


@pytest.fixture
def quick(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(storage, "_pause", slept.append)
    monkeypatch.setattr("copernicus.datasets.store_http.SILENCE_S", 0.3)
    return slept


@pytest.fixture
def hub(monkeypatch):
    files = {f"folder/example-00000{i}.tar": DATA[i:] for i in range(4)}
    files |= {"folder/deeper/other.tar": b"other", "folder/index.json": b"{}", "empty": b""}
    with HubServer(files) as server, Proxy(server.address) as front, Proxy(server.address) as cdn:
        server.cdn = cdn.url
        server.front, server.behind = front, cdn
        monkeypatch.setattr(handles, "_process", None)  # of another test's hub
        monkeypatch.setenv("HF_ENDPOINT", front.url)
        monkeypatch.setenv("HF_TOKEN", "hf_hush")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


# --- http -----------------------------------------------------------------------------------------------------------


def test_http_ranges_are_exact_and_moved_once(hub):
    file = open_file(f"{hub.front.url}/plain/folder/example-000000.tar")
    assert file.read_ranges(RANGES) == EXPECTED
    assert hub.front.sent() - 1 == sum(n for _, n in RANGES) + 10  # the opening byte, the gap
    assert len(hub.front.requests) == 1 + 3
    assert file.stamp() == open_file(file.uri).stamp()
    before = file.stamp()
    assert before.size == len(DATA)
    hub.files["folder/example-000000.tar"] = DATA[::-1]
    assert file.stamp().version not in ("", before.version)
    assert read_bytes(f"{hub.front.url}/plain/empty") == b""
    assert read_bytes(f"{hub.front.url}/plain/folder/index.json") == b"{}"


@pytest.mark.parametrize("mode", ["500", "429", "refuse", "hang", "stall", "cut", "reset", "short"])
def test_http_faults(hub, quick, mode, monkeypatch):
    file = open_file(f"{hub.front.url}/plain/folder/example-000000.tar?X-Amz-Signature=hush")
    file.read(0, 10)
    hub.front.fail(mode, times=2)
    assert file.read(800_000, 100_000) == DATA[800_000:900_000]
    monkeypatch.setattr(storage, "WAITS", (0.2, 0.4))
    hub.front.fail(mode)
    with pytest.raises(StoreError, match=r"^http.*example-000000\.tar.*\(3 tries\)$") as caught:
        file.read(800_000, 100_000)
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert quick[-2:] == [0.2, 0.4]


def test_http_answers_that_are_final(hub, quick):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        read_bytes(f"{hub.front.url}/plain/nothing")
    hub.front.fail("403")
    with pytest.raises(PermissionError, match="access denied"):
        read_bytes(f"{hub.front.url}/plain/empty")
    hub.front.heal()
    with pytest.raises(StoreError, match="serves no byte ranges"):
        read_bytes(f"{hub.front.url}/whole/folder/example-000000.tar")
    with pytest.raises(StoreError, match="cannot be written"):
        write_bytes(f"{hub.front.url}/plain/new", b"")
    with pytest.raises(StoreError, match="host"):
        read_bytes("http:///nowhere")
    assert quick == []


def test_an_http_file_replaced_while_it_is_open(hub, quick):
    file = open_file(f"{hub.front.url}/plain/folder/example-000000.tar")
    assert file.read(0, 100) == DATA[:100]
    hub.files["folder/example-000000.tar"] = DATA[1000:]
    assert file.read(0, 100) == DATA[1000:1100]
    with pytest.raises(StoreError, match=f"ends at byte {len(DATA) - 1000}"):
        file.read(len(DATA) - 500, 100)


def test_http_shards(hub, quick):
    base = f"{hub.front.url}/plain/folder/example"
    assert expand(f"{base}-{{000000..000003}}.tar") == [f"{base}-00000{i}.tar" for i in range(4)]
    with pytest.raises(InputError, match=r"example-000004\.tar does not exist"):
        expand(f"{base}-{{000002..000004}}.tar")
    with pytest.raises(InputError, match="lists no folders"):
        expand(f"{base}-*.tar")


# --- the hub --------------------------------------------------------------------------------------------------------

SET = "hf://datasets/own/set"


@pytest.mark.parametrize("uri", [f"{SET}/folder/example-000000.tar", f"{SET}@v1/folder/example-000000.tar"])
def test_hub_files_are_resolved_once_and_read_where_they_lie(hub, uri):
    file = open_file(uri)
    for _ in range(3):
        assert file.read_ranges(RANGES) == EXPECTED
    assert len(hub.front.requests) == 1  # the hub counts these
    assert hub.behind.sent() <= 3 * 1.05 * sum(n for _, n in RANGES) + 1
    assert file.stamp().version.startswith("lfs-")
    assert file.stamp().size == len(DATA)
    tokens = {token for path, token in hub.tokens if path.startswith("/datasets")}
    assert tokens == {"Bearer hf_hush"}
    assert {token for path, token in hub.tokens if path.startswith("/cdn")} == {""}


def test_a_small_hub_file_without_redirect(hub):
    assert read_bytes(f"{SET}/folder/index.json") == b"{}"
    assert open_file(f"{SET}/folder/index.json").stamp().size == 2


def test_an_expired_address_is_resolved_again(hub, quick):
    file = open_file(f"{SET}/folder/example-000000.tar")
    file.read(0, 10)
    hub.expire()
    assert file.read_ranges(RANGES) == EXPECTED
    assert quick == []


def test_hub_faults(hub, quick):
    file = open_file(f"{SET}/folder/example-000001.tar")
    hub.front.fail("500", times=2)
    hub.behind.fail("cut", times=2)
    assert file.read(10, 100) == DATA[11:111]
    with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
        read_bytes(f"{SET}/folder/nothing.json")
    with pytest.raises(StoreError, match="not of the form hf://"):
        read_bytes("hf://own")


def test_hub_shards(hub):
    found = [f"{SET}/folder/example-00000{i}.tar" for i in range(4)]
    assert expand(f"{SET}/folder/example-{{000000..000003}}.tar") == found
    assert len(hub.front.passed("GET", "/tree/")) == 1
    assert hub.front.passed("GET", "/resolve/") == []
    assert expand(f"{SET}/folder") == found
    assert expand(f"{SET}/*/example-00000[12].tar") == found[1:3]
    assert expand(f"{SET}/folder/*-000003.tar") == found[3:]
    assert expand(f"{SET}/folder/*/*.tar") == [f"{SET}/folder/deeper/other.tar"]
    with pytest.raises(InputError, match=r"example-000007\.tar does not exist"):
        expand(f"{SET}/folder/example-{{000003,000007}}.tar")
    with pytest.raises(InputError, match="nowhere does not exist"):
        expand(f"{SET}/nowhere")
    with pytest.raises(InputError, match="access denied"):
        expand("hf://datasets/own/closed/folder")
    assert list_folder(f"{SET}/folder")["deeper"] is True


# --- Google Cloud Storage, as far as an emulator goes ---------------------------------------------------------------

EMULATOR = """
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
server.start()
print("started", flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def emulator():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", EMULATOR, str(port)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "started\n"
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()


@pytest.fixture
def gs(emulator, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)


def test_gs(gs, quick):
    base = "gs://bucket/folder"
    for i in range(3):
        write_bytes(f"{base}/example-{i}.tar", DATA[i:])
    file = open_file(f"{base}/example-0.tar")
    before = file.stamp()
    assert before.size == len(DATA)
    assert file.read_ranges(RANGES) == EXPECTED
    assert file.stamp() == before
    assert read_bytes(file.uri) == DATA
    time.sleep(0.01)
    write_bytes(file.uri, DATA[::-1])
    assert file.stamp().version not in ("", before.version)
    assert expand(f"{base}/example-{{0..2}}.tar") == expand(base) == expand(f"{base}/*.tar")
    other = open_file(f"{base}/example-1.tar")
    assert stamps([other.uri, f"{base}/none"]) == [other.stamp(), None]
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        read_bytes(f"{base}/nothing")
    with pytest.raises(InputError, match=r"example-3\.tar does not exist"):
        expand(f"{base}/example-{{0..3}}.tar")
    assert quick == []


# --- all others, through fsspec -------------------------------------------------------------------------------------


def test_another_kind_of_store():
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/folder/example-{i}.tar": DATA[i:] for i in range(3)})
    file = open_file("memory://folder/example-0.tar")
    assert file.read_ranges(RANGES) == EXPECTED
    before = file.stamp()
    write_bytes("memory://folder/example-0.tar", b"another")
    assert file.stamp() != before
    assert read_bytes(file.uri) == b"another"
    assert expand("memory://folder/example-{0..2}.tar") == [f"memory://folder/example-{i}.tar" for i in range(3)]
    assert expand("memory://folder") == expand("memory://folder/*.tar")
    with pytest.raises(FileNotFoundError):
        read_bytes("memory://folder/nothing")


def test_an_unknown_kind_of_store(monkeypatch):
    with pytest.raises(StoreError, match="no such kind of store"):
        read_bytes("floppy://a/b")
    with pytest.raises(InputError, match="no such kind of store"):
        expand("floppy://a/b.tar")
