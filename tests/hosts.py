"""Isolated hosts on one machine: real sshd, addresses and process tables of their own, so that `ray up` and what breaks
machines can be tried.

A host is a set of Linux namespaces (network, processes, mounts, name) on a bridge. It has its own /tmp (a small file
system in memory, as a disk that can be filled), its own /dev/shm, home and host name. Everything else is this machine's:
what is installed here is installed there, and any folder outside /tmp is shared storage. The caller stays outside, with
an address on the bridge, as a laptop beside a cluster.

A host lives as long as its first process, which the kernel ends with the caller, however that ends; its mounts, its end
of the cable and its processes go with it. The bridge can stay behind a killed caller, and for a moment the cables: the
next one removes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

NETWORK = "10.77"
NAMED = "cphost"
"""How the bridges' names begin; the third number of their addresses follows. Linux allows 15 characters."""
NEEDED = ("ip", "unshare", "setpriv", "ssh", "ssh-keygen", "rsync", "mount")
PACKAGES = "openssh-server, openssh-client, iproute2, rsync"

BOOT = r"""
set -e
hostname {name}
mkdir -p {own}/tmp {own}/home
mount -t tmpfs -o size={disk},mode=1777 tmpfs {own}/tmp
for folder in {visible}; do
    mkdir -p {own}"$folder"
    mount --bind "$folder" {own}"$folder"
done
for file in passwd shadow hosts; do mount --bind {own}/$file /etc/$file; done
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --rbind {own}/tmp /tmp
ip link set lo up
until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
ip address add {address}/24 dev eth0
# Not in this shell's place, which is the first process, and buries the orphans.
/usr/sbin/sshd -D -e -f {own}/sshd_config &
wait
"""


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "isolated hosts need Linux and root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in (*NEEDED, "sshd") if shutil.which(name, path=path) is None]
    if missing:
        return f"isolated hosts need {', '.join(missing)} (Debian: {PACKAGES})"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--uts", "--fork", "--mount", "--mount-proc", "sh", "-c",
         "mount -t tmpfs tmpfs /tmp && ip link add cphosttry type veth peer name cphostyrt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode:
        return f"isolated hosts are not allowed here: {tried.stderr.strip().splitlines()[-1]}"
    return ""


class Host:
    """One host. ``address``: where its sshd listens; ``folder``: what outlasts a restart, its home for one."""

    def __init__(self, network: Network, number: int, disk_mb: int):
        self.network, self.number, self.disk_mb = network, number, disk_mb
        self.name = f"host{number}"
        self.folder = network.folder / self.name
        self.home = self.folder / "home"
        self._process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.network.number}.{self.number + 1}"

    @property
    def cable(self) -> str:
        return f"{self.network.bridge}v{self.number}"

    @property
    def on(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Switch it on, and wait for its sshd. /tmp is empty then, as after any start."""
        self._write_files()
        # In /tmp, which each host has for itself, stay visible: the shared folder, the interpreter and the checkout.
        inside = [p for p in self.network.visible if p.is_relative_to("/tmp")]
        script = BOOT.format(
            name=self.name, address=self.address, own=shlex.quote(str(self.folder)), disk=f"{self.disk_mb}m",
            visible=" ".join(shlex.quote(str(p)) for p in inside),
        )  # fmt: skip
        with open(self.folder / "boot.log", "ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork",
                 "--kill-child", "--mount-proc", "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            )  # fmt: skip
        pid = self._process.pid
        self._until(lambda: _namespace("net", pid) not in (None, _namespace("net", os.getpid())))
        # Of a caller who was killed just now, perhaps: the bridge's number is ours, and so is the cable's name.
        _ip("link", "delete", self.cable, check=False)
        _ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _ip("link", "set", self.cable, "master", self.network.bridge, "up")
        self._until(self._answers)

    def stop(self) -> None:
        """Switch it off, as by its plug."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            for first in psutil.Process(self._process.pid).children():
                first.kill()  # and the kernel all others
        try:
            self._process.wait(timeout=30)  # it ends with the first process, and buries it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        _ip("link", "delete", self.cable, check=False)

    def run(self, command: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """A command over ssh.

        Raises:
            AssertionError: it ended with another code than 0, and ``check``; the message has what it said.
        """
        done = subprocess.run(
            [*self.network.ssh(), f"root@{self.address}", command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{self.name}: {command}\n{done.stdout}{done.stderr}"
        return done

    def cut(self) -> None:
        """Off the network; everything on it runs on."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Back on the network."""
        _ip("link", "set", self.cable, "up")

    def processes(self, pattern: str) -> list[psutil.Process]:
        """Its processes whose command line holds ``pattern``, by the order of their start."""
        assert self._process is not None, f"{self.name} is switched off"
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                if pattern in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def kill(self, pattern: str, number: signal.Signals = signal.SIGKILL) -> int:
        """A signal to its processes of that pattern; how many there were."""
        found = self.processes(pattern)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        return len(found)

    @contextlib.contextmanager
    def slow(self, pattern: str, share: float, period_s: float = 0.2) -> Iterator[None]:
        """Its processes of that pattern run for ``share`` of the time only: stopped and let go on in turns."""
        ended = threading.Event()

        def turns() -> None:
            while not ended.is_set():
                processes = self.processes(pattern)
                for pause, number in ((1 - share, signal.SIGSTOP), (share, signal.SIGCONT)):
                    for process in processes:
                        with contextlib.suppress(psutil.Error):
                            process.send_signal(number)
                    ended.wait(pause * period_s)
                    if number == signal.SIGSTOP and ended.is_set():
                        self.kill(pattern, signal.SIGCONT)

        thread = threading.Thread(target=turns, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def fill(self, path: str = "/tmp") -> None:
        """Fill the file system of ``path`` with a file ``full`` to the last byte."""
        # dd ends with an error, which is the point of it.
        self.run(f"dd if=/dev/zero of={path}/full bs=1M; test $(df --output=avail {path} | tail -n 1) = 0")

    def free(self, path: str = "/tmp") -> None:
        """Remove what `fill` wrote."""
        self.run(f"rm -f {path}/full")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.address, 22), timeout=0.2):
            return self.run("true", check=False).returncode == 0
        return False

    def _until(self, there: Callable[[], bool]) -> None:
        assert self._process is not None
        end = time.monotonic() + 60
        while not there():
            log = (self.folder / "boot.log").read_text()
            assert self._process.poll() is None, f"{self.name} did not start:\n{log}"
            assert time.monotonic() < end, f"{self.name} does not answer:\n{log}"
            time.sleep(0.05)

    def _write_files(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / ".bashrc").touch()  # `ray up` expects one, as any user has
        users = Path("/etc/passwd").read_text().splitlines()
        users = [f"root:x:0:0:root:{self.home}:/bin/bash" if u.startswith("root:") else u for u in users]
        if not any(u.startswith("sshd:") for u in users):
            users.append("sshd:x:105:65534::/run/sshd:/usr/sbin/nologin")
        (self.folder / "passwd").write_text("\n".join(users) + "\n")
        (self.folder / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n")
        (self.folder / "shadow").chmod(0o600)
        # Without a way out of the bridge, Ray takes a host's address from its name.
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.network.key}\nListenAddress {self.address}\nAuthorizedKeysFile {self.network.key}.pub\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPrintMotd no\nPidFile none\n"
            "MaxStartups 100\nMaxSessions 100\nSubsystem sftp internal-sftp\n"
        )


class Network:
    """The bridge, the key that opens all hosts, and the folder that they share at the same path (``shared``)."""

    def __init__(self, folder: Path, count: int, disk_mb: int):
        self.folder = folder
        self.shared = folder / "shared"
        self.key = folder / "key"
        checkout = Path(__file__).resolve().parents[1]
        self.visible = [self.folder, checkout, *{Path(sys.prefix), Path(sys.base_prefix)}]
        self.number = 0
        self.hosts = [Host(self, number, disk_mb) for number in range(1, count + 1)]

    @property
    def bridge(self) -> str:
        return f"{NAMED}{self.number}"

    @property
    def address(self) -> str:
        """The caller's own."""
        return f"{NETWORK}.{self.number}.1"

    def ssh(self) -> list[str]:
        options = (
            f"-i {self.key} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            "-o LogLevel=ERROR -o ConnectTimeout=5 -o BatchMode=yes -F none"
        )
        return ["ssh", *options.split()]

    def start(self) -> None:
        self.shared.mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        self._bridge()
        for host in self.hosts:
            host.start()

    def stop(self) -> None:
        for host in self.hosts:
            host.stop()
        if self.number:
            _ip("link", "delete", self.bridge, check=False)

    def _bridge(self) -> None:
        """One of a free number: the kernel makes a name once only, so that two callers cannot get the same."""
        _remove_left_behind()
        for number in range(1, 255):
            if _ip("link", "add", f"{NAMED}{number}", "type", "bridge", check=False).returncode == 0:
                self.number = number
                _ip("link", "set", self.bridge, "alias", str(os.getpid()))
                _ip("address", "add", f"{self.address}/24", "dev", self.bridge)
                _ip("link", "set", self.bridge, "up")
                return
        raise RuntimeError("no bridge could be made")


@contextlib.contextmanager
def isolated_hosts(folder: Path, count: int = 2, disk_mb: int = 1024) -> Iterator[Network]:
    """``count`` hosts that run, on a network of their own; nothing of them is left afterwards but files in ``folder``.

    ``disk_mb``: size of each host's /tmp.
    """
    network = Network(folder, count, disk_mb)
    try:
        network.start()
        yield network
    finally:
        network.stop()


def _namespace(kind: str, pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    return None


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done


def _remove_left_behind() -> None:
    """Bridges whose caller was killed."""
    for link in json.loads(_ip("-json", "link", "show", "type", "bridge").stdout or "[]"):
        alias = link.get("ifalias", "")
        if link["ifname"].startswith(NAMED) and alias.isdigit() and not psutil.pid_exists(int(alias)):
            _ip("link", "delete", link["ifname"], check=False)
