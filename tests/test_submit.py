"""``copernicus submit``, ``jobs``, ``logs`` and ``stop`` against a job server of our own; `test_submit_ray.py` has Ray's."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from job_server import FakeJobs, job_server
from rich.console import Console
from test_run import interruptible
from test_secrets import HUB

from copernicus.datasets.sensors import InputError
from copernicus.platform import cluster, following
from copernicus.platform.cluster import JobServer, JobServerLost, default_address, entrypoint, find_token
from copernicus.platform.experiment import ExperimentError, load_experiment
from copernicus.platform.submit import Where, jobs_command, logs_command, notes, stop_command, submit_command

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart_smoke.yaml"
SWEEP = """
name: mine
kind: sweep
sweep:
  data: ${oc.env:BENCH_FOLDER}
  tasks: [eurosat_s2]
  encoders: {random: {weights: none, model: {name: copernicus_fm_base}}}
"""


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("RAY_A", "MLFLOW_TRACKING_URI", "COPERNICUS_", "BENCH_FOLDER")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(following, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def state():
    return FakeJobs()


@pytest.fixture
def server(state):
    with job_server(state) as running:
        yield running


@pytest.fixture
def sweep(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(SWEEP)
    return file


class Screen(Console):
    def __init__(self):
        import io

        super().__init__(file=io.StringIO(), width=160)

    @property
    def text(self) -> str:
        return self.file.getvalue()  # type: ignore[attr-defined]


def submit(server, path, *overrides, **options):
    screen = Screen()
    code = submit_command(path, overrides, Where(address=server.address), screen, **options)
    return code, screen.text


def ends_soon(state, status, code, log=""):
    """The job ends as soon as one is there."""

    def end():
        while not state.jobs:
            time.sleep(0.01)
        (name,) = state.jobs
        state.logs[name] = log
        state.end(name, status, code)

    threading.Thread(target=end, daemon=True).start()


def test_what_a_job_is_made_of(state, server, sweep):
    code, shown = submit(server, sweep, "sweep.trials=3", "tracking.uri=http://me:${oc.env:PW}@h:1", detach=True, fresh=True)  # fmt: skip
    assert code == 0
    ((name, job),) = state.jobs.items()
    fingerprint = load_experiment(sweep, ["sweep.trials=3"], here=False).fingerprint
    assert name == f"mine-{fingerprint}-1"
    assert name in shown
    assert f"copernicus logs {name} --follow --address {server.address}" in shown
    assert job["metadata"].items() >= {"experiment": "mine", "kind": "sweep", "fingerprint": fingerprint}.items()
    assert all(isinstance(value, str) for value in job["metadata"].values())
    (package,) = state.packages
    assert job["runtime_env"] == {
        "working_dir": f"gcs://{package}", "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
    }  # fmt: skip
    assert job["entrypoint"].endswith(
        'exec python -m copernicus.platform.cli run "$JOB/experiment.yaml" --fresh sweep.trials=3 '
        "'tracking.uri=http://me:${oc.env:PW}@h:1'"
    )


@pytest.mark.parametrize(
    ("status", "code", "expected", "said"),
    [
        ("SUCCEEDED", 0, 0, "is done"),
        ("FAILED", 1, 1, "exit code 1"),
        ("FAILED", 2, 2, "exit code 2"),
        ("FAILED", 130, 130, "exit code 130"),
        ("FAILED", -9, 1, "killed (signal 9). Submit the same"),
        ("FAILED", None, 1, "failed: no message"),
        ("STOPPED", None, 130, "was stopped. Submit the same"),
    ],
)
def test_it_ends_as_the_job_ends(state, server, sweep, capsys, status, code, expected, said):
    ends_soon(state, status, code, "In /shared on head\nhello\n")
    ended, shown = submit(server, sweep)
    assert ended == expected
    assert said in shown
    assert capsys.readouterr().out == "In /shared on head\nhello\n"


def test_an_unchanged_experiment_is_not_sent_again(state, server, sweep):
    assert "sent" in submit(server, sweep, detach=True)[1]
    state.end(*state.jobs)
    assert "there already" in submit(server, sweep, "seed=1", detach=True)[1]
    assert len(state.uploads) == 1


def test_the_same_experiment_is_not_run_twice_at_once(state, server, sweep):
    submit(server, sweep, detach=True)
    (name,) = state.jobs
    with pytest.raises(InputError, match=rf"run by the job {name}; follow it with `copernicus logs {name} --follow"):
        submit(server, sweep, detach=True)
    submit(server, sweep, "seed=1", detach=True)  # another one may
    state.end(name)
    submit(server, sweep, detach=True)
    assert name.removesuffix("1") + "2" in state.jobs
    assert len(state.jobs) == 3


def test_a_lost_answer_makes_no_second_job(state, server, sweep):
    state.lose_answers = 1
    assert submit(server, sweep, detach=True)[0] == 0
    assert len(state.jobs) == 1


def test_another_s_job_of_the_same_name_is_not_taken_for_ours(state, server):
    state.add("a-1", entrypoint="other")
    with pytest.raises(InputError, match="there already"):
        JobServer(server.address).submit("a-1", "mine", {}, {})


# What is checked before anything is sent


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sweep.trails=3", "sweep.trails: unknown key"),
        ("sweep.trials=none", "sweep.trials"),
        ("sweep.tasks=[eurosat]", "no 'eurosat'"),
        ("tracking.uri=postgresql://me:hunter2@db/mlflow", "override tracking.uri: holds a password"),
        (f"sweep.data={HUB}", "override sweep.data: holds an access token of Hugging Face"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(state, server, sweep, override, expected):
    before = len(state.requests)
    with pytest.raises(ExperimentError, match=re.escape(expected)) as error:
        submit(server, sweep, override)
    assert "hunter2" not in str(error.value)
    assert HUB not in str(error.value)
    assert len(state.requests) == before
    assert state.packages == {}


def test_credentials_in_the_yaml_are_refused_even_in_a_comment(state, server, sweep):
    sweep.write_text(SWEEP + f"# HF_TOKEN={HUB}\n")
    with pytest.raises(ExperimentError, match=r"mine\.yaml: line 8: holds an access token.*\$\{oc\.env:NAME\}"):
        submit(server, sweep)
    with pytest.raises(ExperimentError, match="access token"):  # nor does `copernicus run` take it
        load_experiment(sweep)
    assert state.packages == {}


def test_variables_of_the_cluster_need_not_be_set_here(sweep, monkeypatch):
    here_not = load_experiment(sweep, here=False)
    monkeypatch.setenv("BENCH_FOLDER", "/somewhere/else")
    assert load_experiment(sweep, here=False) == here_not
    with pytest.raises(ExperimentError, match="no such file or folder: /somewhere/else"):
        load_experiment(sweep)


@pytest.mark.parametrize(
    "override",
    [
        "sweep.trials=${oc.env:TRIALS}", "sweep.protocol=${oc.env:PROTOCOL}", "name=${oc.env:WHO}-run", "kind=${oc.env:KIND}",
        "sweep.data=/data/${oc.env:A}/${oc.env:B}", "sweep.tasks=['${oc.env:TASK}']", "tracking.uri=${oc.env:URI}",
        "sweep.encoders.random.language=${oc.env:FILE}", "sweep.encoders.random.model.name=my_encoders:FourBands",
        "sweep.encoders.random.weights=/only/there.pth", "sweep.trials=${oc.decode:${oc.env:TRIALS}}",
        "sweep.cpus_per_trial=${oc.env:CPUS,2}",
    ],
)  # fmt: skip
def test_what_only_the_cluster_knows_is_left_to_it(sweep, override):
    load_experiment(sweep, [override], here=False)


def test_a_variable_s_default_is_checked_here(sweep):
    assert load_experiment(sweep, ["sweep.cpus_per_trial=${oc.env:CPUS,2}"], here=False).sweep.cpus_per_trial == 2
    with pytest.raises(ExperimentError, match=r"sweep.cpus_per_trial: must be positive"):
        load_experiment(sweep, ["sweep.cpus_per_trial=${oc.env:CPUS,-2}"], here=False)


def test_files_that_are_here_are_said_to_be_read_there(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "w.pth").touch()
    experiment = load_experiment(
        sweep, ["sweep.data=bench", "sweep.encoders.random.weights=w.pth", "seed=1"], here=False
    )
    assert notes(experiment) == [
        "note: sweep.data is read on the cluster, not here: bench",
        "note: sweep.encoders.random.weights is read on the cluster, not here: w.pth",
    ]
    (tmp_path / "runs" / "miniature_tiny" / "bench").mkdir(parents=True)  # the cluster makes its own
    assert notes(load_experiment(QUICKSTART, here=False)) == []


def test_the_tracking_store_that_the_environment_names(sweep, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert load_experiment(QUICKSTART).tracking.uri == "http://127.0.0.1:5000"
    assert load_experiment(QUICKSTART, ["tracking.uri=sqlite:///x.db"]).tracking.uri == "sqlite:///x.db"
    assert "uri: http://127.0.0.1:5000" in load_experiment(QUICKSTART).to_yaml()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert load_experiment(QUICKSTART).tracking.uri == "sqlite:///mlflow.db"


# Tokens and addresses


def test_a_token_is_sent_only_where_one_is_asked_for(state, server, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "let-me-in")
    JobServer(server.address).jobs()
    assert set(state.authorizations) == {None}
    state.token = "let-me-in"
    JobServer(server.address).jobs()
    assert state.authorizations[-1] == "Bearer let-me-in"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(InputError, match=r"asks for a token: put it into .*auth_token"):
        JobServer(server.address)
    file = tmp_path / "home" / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text("let-me-in\n")
    assert find_token() == ("let-me-in", str(file))
    JobServer(server.address).jobs()
    file.write_text("another")
    with pytest.raises(InputError, match=f"refuses the token of {file}"):
        JobServer(server.address)


@pytest.mark.parametrize("token", ["two\nlines", "a word", "s\u00fcr\u00fccek"])
def test_what_is_no_token_is_said_and_not_shown(state, server, monkeypatch, tmp_path, token):
    state.token = "let-me-in"
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(InputError, match=r"^RAY_AUTH_TOKEN: is no token") as raised:
        JobServer(server.address)
    assert token not in str(raised.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(token, encoding="utf-8")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InputError, match="token: is no token"):
        JobServer(server.address)


def test_a_netrc_does_not_take_the_token_s_place(state, server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "let-me-in")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nor is a proxy asked for this machine
    state.token = "let-me-in"
    assert JobServer(server.address).jobs() == []


def test_the_token_is_nowhere_in_the_job(state, server, sweep, monkeypatch):
    state.token = "the-cluster-s-token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", state.token)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-mine")
    submit(server, sweep, detach=True)
    for secret in (state.token, "a-secret-of-mine"):
        assert secret not in json.dumps(state.jobs)
        assert all(secret.encode() not in content for content in state.packages.values())


def test_addresses(state, server, monkeypatch):
    assert default_address() == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert default_address() == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example")
    assert default_address() == "https://ray.example"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
    assert default_address() == server.address
    for wrong in ("10.0.0.1:8265", "ray://10.0.0.1:10001", "auto"):
        with pytest.raises(InputError, match=r"give the job server's, as in http://127.0.0.1:8265"):
            JobServer(wrong)
    with pytest.raises(InputError, match=r"no Ray job server answers at http://127.0.0.1:9 .*connection refused"):
        JobServer("http://127.0.0.1:9")
    with pytest.raises(InputError, match="not both"), cluster.connect("http://127.0.0.1:9", Path("c.yaml")):
        pass


def test_another_ray_is_refused(state, server):
    state.ray_version = "2.9.3"
    with pytest.raises(InputError, match=r"runs Ray 2\.9\.3, this copernicus works with Ray 2\.6"):
        JobServer(server.address)


def test_what_is_no_job_server_is_said(tmp_path):
    import functools
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match="is no Ray job server"):
            JobServer(f"http://127.0.0.1:{other.server_port}")
    finally:
        other.shutdown()
        other.server_close()


# jobs, logs, stop


def test_jobs_are_listed_the_latest_first(state, server):
    screen = Screen()
    jobs_command(Where(address=server.address), screen)
    assert "No jobs yet" in screen.text
    state.add("first-1", "FAILED", code=2, metadata={"kind": "sweep", "user": "ada"}, end_time=1_700_000_030_000)
    state.add("second-1", metadata={"kind": "pretrain"})
    screen = Screen()
    jobs_command(Where(address=server.address), screen)
    rows = screen.text.splitlines()
    assert [row.split()[0] for row in rows] == ["job", "second-1", "first-1"]
    assert "failed (2)" in rows[2]
    assert "30 s" in rows[2]
    assert "ada" in rows[2]


def test_logs_so_far_and_followed(state, server, capsys):
    state.add("a-1", log="one\n")
    assert logs_command("a-1", Where(address=server.address), Screen()) == 0
    assert capsys.readouterr().out == "one\n"
    state.end("a-1", "FAILED", 2)
    assert logs_command("a-1", Where(address=server.address), Screen(), following=True) == 2
    assert capsys.readouterr().out == "one\n"
    with pytest.raises(InputError, match=r"no job b-1 on .*`copernicus jobs` lists them"):
        logs_command("b-1", Where(address=server.address), Screen())


def test_stop_waits_until_the_job_has_ended(state, server, monkeypatch):
    state.add("a-1")
    screen = Screen()
    assert stop_command("a-1", Where(address=server.address), screen) == 0
    assert "was stopped" in screen.text
    assert state.jobs["a-1"]["status"] == "STOPPED"
    assert stop_command("a-1", Where(address=server.address), Screen()) == 0  # again: it has ended
    state.add("b-1")
    state.ends_when_stopped = False
    monkeypatch.setattr("copernicus.platform.submit.STOP_GRACE_S", -15)
    screen = Screen()
    assert stop_command("b-1", Where(address=server.address), screen) == 1
    assert "still running" in screen.text


def test_ctrl_c_leaves_the_job_running(state, server, sweep):
    command = [sys.executable, "-m", "copernicus.platform.cli", "submit", str(sweep), "--address", server.address]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=sweep.parent, preexec_fn=interruptible
    )
    try:
        while not any(path.endswith("/tail") for _, path in state.requests):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    (name,) = state.jobs
    assert process.returncode == 130
    assert f"The job {name} goes on." in shown
    assert f"copernicus stop {name} --address {server.address}" in shown
    assert "Traceback" not in shown
    assert state.jobs[name]["status"] == "RUNNING"


def test_a_server_lost_on_the_way_is_no_wrong_input(state, server, sweep, monkeypatch):
    monkeypatch.setattr(following, "PATIENCE_S", 0.1)
    monkeypatch.setattr(JobServer, "job", lambda *_: (_ for _ in ()).throw(JobServerLost("no answer in time")))
    state.drops = [0] * 1000
    state.add("a-1", log="one\n")
    with pytest.raises(JobServerLost, match=r"`copernicus logs a-1 --follow --address .*` follows it again"):
        logs_command("a-1", Where(address=server.address), Screen(), following=True)


# The job's shell command


def run_entrypoint(command: str, folder: Path, storage: str | None) -> subprocess.CompletedProcess:
    """As Ray does, with a ``python`` that says what it was given."""
    (folder / "bin").mkdir(exist_ok=True)
    fake = folder / "bin" / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\nexit 7\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    if storage is not None:
        environment["COPERNICUS_STORAGE"] = storage
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=20)


def test_it_runs_in_the_shared_folder_and_hands_overrides_on_untouched(tmp_path):
    job, shared = tmp_path / "job folder", tmp_path / "shared folder"
    job.mkdir()
    shared.mkdir()
    overrides = ["name=it's", "sweep.data=${oc.env:HOME}", 'a="$(touch hacked)"', "b=`id`; exit 0"]
    done = run_entrypoint(entrypoint(overrides, fresh=True), job, str(shared))
    first, where, *arguments = done.stdout.splitlines()
    assert first.startswith(f"In {shared} on ")
    assert where == str(shared)
    assert arguments == [
        "-m", "copernicus.platform.cli", "run", f"{job}/experiment.yaml", "--fresh", *overrides
    ]  # fmt: skip
    assert done.returncode == 7
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("storage", [None, "", "/no/such/folder"])
def test_without_a_shared_folder_it_ends_with_one_message(tmp_path, storage):
    done = run_entrypoint(entrypoint([]), tmp_path, storage)
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if line]
    assert line.startswith("error: ")
    assert "--storage" in line
    assert "COPERNICUS_STORAGE" in line


def test_a_relative_storage_is_refused(state, server, sweep):
    with pytest.raises(InputError, match="--storage shared: give the absolute path"):
        submit(server, sweep, storage="shared")
    submit(server, sweep, storage="/mnt/shared", detach=True)
    (job,) = state.jobs.values()
    assert job["runtime_env"]["env_vars"]["COPERNICUS_STORAGE"] == "/mnt/shared"
