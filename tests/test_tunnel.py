"""Tunnels through a real sshd on loopback, which a proxy command finds (a cluster's file has no place for a port)."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml

from copernicus.datasets.sensors import InputError
from copernicus.platform.tunnel import head_of, open_tunnel

PROXY = """
import os, socket, sys, threading
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def up():
    while data := os.read(0, 65536):
        s.sendall(data)
    os._exit(0)
threading.Thread(target=up, daemon=True).start()
while data := s.recv(65536):
    os.write(1, data)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_key(file: Path) -> Path:
    file.unlink(missing_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True, stdin=subprocess.DEVNULL
    )
    return file


class Sshd:
    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.key = make_key(folder / "client")
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        host_key = make_key(self.folder / "host")
        (self.folder / "config").write_text(
            f"HostKey {host_key}\nAuthorizedKeysFile {self.key}.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
            f"PermitRootLogin yes\nListenAddress 127.0.0.1:{self.port}\nPasswordAuthentication no\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "config")],
            stderr=(self.folder / "sshd.log").open("w"),
        )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert time.monotonic() < deadline, (self.folder / "sshd.log").read_text()
            time.sleep(0.05)

    def cut(self) -> int:
        """End the connections, not the server; how many processes of theirs there were."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        return len(children)

    def close(self) -> None:
        assert self.process is not None
        self.cut()
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    if os.geteuid() != 0 or not Path("/usr/sbin/sshd").exists():
        pytest.skip("needs root and openssh-server, for an sshd of its own")
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()


@pytest.fixture
def cluster(sshd, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    (tmp_path / "proxy.py").write_text(PROXY)
    file = tmp_path / "cluster.yaml"
    proxy = f"{sys.executable} {tmp_path / 'proxy.py'} {sshd.port}"
    config = {
        "cluster_name": "test",
        "provider": {"type": "local", "head_ip": "head.test", "worker_ips": []},
        "auth": {"ssh_user": getpass.getuser(), "ssh_private_key": str(sshd.key), "ssh_proxy_command": proxy},
    }
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
def page():
    """A web server on "the head"; what it was asked for, by its Host header."""
    hosts = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            hosts.append(self.headers["Host"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, hosts
    server.shutdown()
    server.server_close()


def fetch(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        return answer.read()


def ssh_children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.name() == "ssh"]


def test_a_port_of_the_head_is_reached_and_the_tunnel_goes_with_its_command(cluster, page):
    port, hosts = page
    wanted = free_port()
    with open_tunnel(cluster, {port: wanted}) as ports:
        assert ports == {port: wanted}
        assert fetch(wanted) == b"hello"
        assert hosts == [f"127.0.0.1:{wanted}"]  # MLflow looks at the name and port that the browser knows
        assert len(ssh_children()) == 1
    assert ssh_children() == []
    with pytest.raises(OSError, match="refused"):
        fetch(wanted)


def test_a_port_that_is_taken_here_is_replaced(cluster, page):
    port, _ = page  # "the head" is this machine: its own port is taken
    with open_tunnel(cluster, {port: port}) as ports:
        assert ports[port] != port
        assert fetch(ports[port]) == b"hello"


def test_a_connection_that_breaks_is_made_again(cluster, page, sshd):
    port, _ = page
    with open_tunnel(cluster, {port: free_port()}) as ports:
        assert fetch(ports[port]) == b"hello"
        (first,) = ssh_children()
        assert sshd.cut()
        first.wait(20)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                assert fetch(ports[port]) == b"hello"
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [p.pid for p in ssh_children()] != [first.pid]


def test_a_killed_command_leaves_no_ssh_behind(cluster, page):
    port, _ = page
    code = (
        "import sys, time; from pathlib import Path; from copernicus.platform.tunnel import open_tunnel\n"
        f"with open_tunnel(Path({str(cluster)!r}), {{{port}: {free_port()}}}): print('open', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        (ssh,) = [p for p in psutil.Process(process.pid).children() if p.name() == "ssh"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        ssh.wait(20)  # nobody ended it but the pipe
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_head_that_is_another_machine_than_before_is_refused(cluster, page, sshd):
    port, _ = page
    with open_tunnel(cluster, {port: free_port()}):
        pass
    sshd.close()
    sshd.start()  # with a new host key
    with pytest.raises(InputError, match=r"no SSH connection to \w+@head\.test: Host key verification failed"):
        open_tunnel(cluster, {port: free_port()}).__enter__()
    assert ssh_children() == []


def test_a_refused_key_is_one_message(cluster, page, tmp_path):
    port, _ = page
    config = yaml.safe_load(cluster.read_text())
    config["auth"]["ssh_private_key"] = str(make_key(tmp_path / "other"))
    cluster.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"no SSH connection to .*Permission denied"):
        open_tunnel(cluster, {port: free_port()}).__enter__()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("just a text", "is no file for `ray up`"),
        ("provider: {type: local, head_ip: h}\nauth: {}", "auth.ssh_user"),
        ("provider: {type: local, head_ip: h}\nauth: {ssh_user: u, ssh_private_key: /no/key}", "no such file: /no/key"),
        (
            "provider: {type: aws, region: <REGION>}\nauth: {ssh_user: u}",
            "<REGION> is not filled in; `copernicus check",
        ),
    ],
)
def test_a_file_that_is_no_cluster_s_is_refused(tmp_path, text, expected):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=expected):
        head_of(file)
    with pytest.raises(InputError, match="No such file"):
        head_of(tmp_path / "none.yaml")


def test_how_the_head_is_reached(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("provider: {type: local, head_ip: 10.0.0.7}\nauth: {ssh_user: ubuntu}\n")
    head = head_of(file)
    assert (head.address, head.user, head.key, head.proxy) == ("10.0.0.7", "ubuntu", None, None)
