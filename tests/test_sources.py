"""Where weights come from: a local server that speaks the hub's API, a real MLflow store and a real MLflow server.

What is asked of the hub runs in processes of its own, for its client reads HF_ENDPOINT and HF_HOME once, at import.
"""

import fcntl
import hashlib
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request

import pytest
from hub_server import HubServer

from copernicus.datasets.sensors import InputError
from copernicus.models.sources import local_file

WEIGHTS = os.urandom(300_000)
READ = """
import hashlib, sys
from copernicus.datasets.sensors import InputError
from copernicus.models.sources import local_file
try:
    with local_file(sys.argv[1]) as path:
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.resolve())
except InputError as error:
    print("refused:", error)
"""


def ask(source, endpoint, home, **variables):
    """What a process of its own makes of a source: (its output, what it wrote to stderr)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), **variables}
    done = subprocess.run(
        [sys.executable, "-c", READ, source], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1  # one line, refused or not
    return done.stdout.strip(), done.stderr


@pytest.fixture
def hub():
    with HubServer({"w.pth": WEIGHTS, "sub/small.pt": b"few bytes"}) as server:
        server.endpoint = server.cdn
        server.cdn = server.cdn.replace("127.0.0.1", "localhost")  # another host's name, as for the hub's large files
        yield server


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_hub_file_is_fetched_once_checked_and_kept(hub, tmp_path):
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    said, noise = ask("hf://own/model/w.pth", hub.endpoint, tmp_path)
    assert said.startswith(digest)
    assert noise == ""  # no bar off a terminal
    fetched = sum(path.startswith("/cdn/") for path, _ in hub.tokens)
    assert ask("hf://own/model/w.pth", hub.endpoint, tmp_path)[0] == said
    assert sum(path.startswith("/cdn/") for path, _ in hub.tokens) == fetched
    assert ask("hf://own/model/w.pth", closed_port(), tmp_path, HF_HUB_OFFLINE="1")[0] == said
    for source in ("hf://own/model@v1/sub/small.pt", "hf://own/model@refs/pr/1/sub/small.pt"):
        assert ask(source, hub.endpoint, tmp_path)[0].startswith(hashlib.sha256(b"few bytes").hexdigest())


def test_a_bar_shows_on_a_terminal(hub, tmp_path):
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", READ, "hf://own/model/w.pth"], env=environment, stderr=side, check=True)
    os.close(side)
    shown = b""
    try:
        while part := os.read(main, 4096):
            shown += part
    except OSError:  # the terminal's end
        pass
    os.close(main)
    assert b"w.pth" in shown
    assert b"100%" in shown


def test_a_damaged_cache_is_named_and_mended_by_deleting(hub, tmp_path):
    for source in ("hf://own/model/w.pth", "hf://own/model/sub/small.pt"):
        said, _ = ask(source, hub.endpoint, tmp_path)
        blob = said.split()[1]
        with open(blob, "r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]))
        refused, _ = ask(source, hub.endpoint, tmp_path)
        assert "damaged" in refused
        assert blob in refused
        os.unlink(blob)
        assert ask(source, hub.endpoint, tmp_path)[0] == said


def test_what_the_hub_does_not_have_or_does_not_give_is_told_apart(hub, tmp_path):
    cases = {
        "hf://own/model/other.pth": "no file 'other.pth'",
        "hf://own/model@v9/w.pth": "no revision 'v9'",
        "hf://own/nothing/w.pth": "knows no model 'own/nothing'",
        "hf://own/gated/w.pth": "access must be asked for",
        "hf://own": "write hf://owner/repository/file",
    }
    for source, message in cases.items():
        assert message in ask(source, hub.endpoint, tmp_path)[0]


@pytest.mark.slow  # the hub's client tries for twenty seconds
def test_a_hub_that_is_not_there_is_said_with_what_to_do(tmp_path):
    dead = closed_port()
    said, _ = ask("hf://own/model/w.pth", dead, tmp_path)
    for part in ("cannot be reached", "HF_ENDPOINT", "HF_HOME", f"{dead}/own/model/resolve/main/w.pth", str(tmp_path)):
        assert part in said


def test_offline_says_what_to_do(tmp_path):
    dead = closed_port()
    said, _ = ask("hf://own/model/w.pth", dead, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in said


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A local store with a run that holds weights: its URI, and the run's id."""
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("weights", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    (tmp_path / "w.pth").write_bytes(WEIGHTS)
    client.log_artifact(run, str(tmp_path / "w.pth"), "checkpoint")
    return uri, run, client


def test_artifacts_of_a_local_store(logged, tmp_path):
    uri, run, client = logged
    for source in (f"runs:/{run}/checkpoint/w.pth", f"runs:/{run}/checkpoint"):
        with local_file(source) as path:
            assert path.read_bytes() == WEIGHTS
        assert not path.exists()  # a copy, gone with the context
    assert (tmp_path / "artifacts" / run / "artifacts" / "checkpoint" / "w.pth").exists()
    client.create_registered_model("copernicus")
    source = f"{client.get_run(run).info.artifact_uri}/checkpoint"
    client.create_model_version("copernicus", source, run)
    client.set_registered_model_alias("copernicus", "best", 1)
    for source in ("models:/copernicus/1", "models:/copernicus@best"):
        with local_file(source) as path:
            assert path.read_bytes() == WEIGHTS
    for source in (f"runs:/{run}/nothing.pth", "runs:/0123/w.pth", "models:/nobody/1"):
        with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as caught, local_file(source):
            pass
        assert uri in str(caught.value)
        assert "\n" not in str(caught.value)


def test_artifacts_of_a_server(tmp_path, monkeypatch):
    import mlflow

    port = closed_port().rpartition(":")[2]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    uri = f"http://127.0.0.1:{port}"
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        client = mlflow.MlflowClient(uri)
        run = client.create_run(client.create_experiment("weights")).info
        (tmp_path / "w.pth").write_bytes(WEIGHTS)
        client.log_artifact(run.run_id, str(tmp_path / "w.pth"))
        for source in (f"runs:/{run.run_id}/w.pth", f"mlflow-artifacts:/{run.artifact_uri.partition(':/')[2]}/w.pth"):
            with local_file(source) as path:
                assert path.read_bytes() == WEIGHTS
        server.terminate()
        server.wait(60)
        with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"), local_file(f"runs:/{run.run_id}/w.pth"):
            pass
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
