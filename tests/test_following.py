"""A job's log is shown whole, once and in order, whatever happens to the connection."""

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_server import FakeJobs, job_server

from copernicus.platform import following
from copernicus.platform.cluster import JobServer, JobServerLost, JobUnknown
from copernicus.platform.following import Lines, follow


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(following, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(following, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(following, "QUIET_S", 0.1)


def followed(server, name="job"):
    """What is written, what is noticed, and the job at the end."""
    written, noticed = [], []
    job = follow(JobServer(server.address), name, written.append, noticed.append)
    return "".join(written), noticed, job


LINES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=30), min_size=1, max_size=40)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, drops=st.lists(st.integers(1, 400), max_size=4), newline=st.booleans())
def test_every_line_comes_once_wherever_the_connection_breaks(lines, drops, newline):
    log = "\n".join(lines) + ("\n" if newline else "")
    state = FakeJobs(drops=list(drops))
    state.add("job", log=log)
    with job_server(state) as server:
        threading.Timer(0.1, state.end, ("job",)).start()
        written, _, job = followed(server)
    assert written == (log if log.endswith("\n") or not log else log + "\n")
    assert job["status"] == "SUCCEEDED"


def test_a_growing_log_is_shown_as_it_grows():
    state = FakeJobs()
    state.add("job", log="first\n")
    seen = threading.Event()

    def write(text):
        if "first" in text:
            seen.set()

    def driver():
        assert seen.wait(10)  # shown while the job still ran
        state.logs["job"] += "second\n"
        state.end("job")

    thread = threading.Thread(target=driver)
    thread.start()
    with job_server(state) as server:
        assert follow(JobServer(server.address), "job", write, print)["status"] == "SUCCEEDED"
    thread.join()
    assert seen.is_set()


def test_a_server_that_goes_away_and_comes_back_is_waited_for():
    state = FakeJobs()
    state.add("job", log="one\ntwo\n")
    result = []
    with job_server(state) as server:
        port = server.port
        client = JobServer(server.address)
        written, noticed = [], []
        thread = threading.Thread(target=lambda: result.append(follow(client, "job", written.append, noticed.append)))
        thread.start()
        while not written:
            time.sleep(0.01)
    while not noticed:  # it is gone
        time.sleep(0.01)
    state.logs["job"] += "three\n"
    with job_server(state, port):
        while len(noticed) < 2:
            time.sleep(0.01)
        state.end("job", "FAILED", 1)
        thread.join(20)
    assert "".join(written) == "one\ntwo\nthree\n"
    assert "out of reach" in noticed[0]
    assert noticed[1] == "connected again"
    assert result[0]["driver_exit_code"] == 1


def test_a_server_out_of_reach_for_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(following, "PATIENCE_S", 0.2)
    state = FakeJobs()
    state.add("job", log="one\n")
    with job_server(state) as server:
        client = JobServer(server.address)
    with pytest.raises(JobServerLost, match="connection refused"):
        follow(client, "job", print, print)


def test_a_tail_that_stands_still_does_not_hide_the_job_s_end():
    state = FakeJobs(stands_still=True)
    state.add("job", log="all of it\n")
    with job_server(state) as server:
        threading.Timer(0.3, state.end, ("job", "FAILED", 2)).start()
        written, _, job = followed(server)
        state.stands_still = False
    assert written == "all of it\n"
    assert job["driver_exit_code"] == 2


def test_a_log_that_cannot_be_read_to_its_end_is_said():
    state = FakeJobs(broken_logs=True)
    state.add("job", "SUCCEEDED", log="one\n")
    with job_server(state) as server:
        written, noticed, job = followed(server)
    assert written == "one\n"
    assert any("end is missing" in notice and "UnicodeDecodeError" in notice for notice in noticed)
    assert job["status"] == "SUCCEEDED"


def test_a_job_that_a_restarted_head_no_longer_knows_is_said():
    state = FakeJobs()
    state.add("job", log="one\n")
    with job_server(state) as server:
        threading.Timer(0.2, state.jobs.clear).start()
        with pytest.raises(JobUnknown, match="no job job"):
            followed(server)


def test_what_ray_adds_is_left_out():
    written = []
    lines = Lines(written.append)
    for piece in (
        "2026-11-26 07:17:01,123\tINFO job_manager.py:568 -- Runtime env is setting up.\nRunn",
        "ing entrypoint for job a-1: cd x\nIn /shared\n",
        "Running away\nno newline",
    ):
        lines.add(piece)
    lines.close()
    assert "".join(written) == "In /shared\nRunning away\nno newline\n"
