"""SIGTERM, which is how a cluster ends a job, ends a run as Ctrl-C does."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from copernicus.platform.session import ending_on_sigterm

YAML = Path(__file__).parents[1] / "experiments" / "quickstart_smoke.yaml"
WAITING = """
import sys
import copernicus.platform.cli as cli, copernicus.platform.run as run
from copernicus.platform.session import ray_session
def wait(*_, **__):
    with ray_session():
        import ray
        @ray.remote
        def sleep():
            import time
            time.sleep(600)
        print("waiting", flush=True)
        ray.get(sleep.remote())
run.run_experiment = wait
sys.argv = ["copernicus", "run", sys.argv[1]]
cli.main()
"""


def test_the_handler_is_there_only_inside():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ending_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    elsewhere = threading.Thread(target=lambda: ending_on_sigterm().__enter__())
    elsewhere.start()  # only the main thread may set one
    elsewhere.join()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_run_that_waits_for_ray_ends_as_interrupted(tmp_path):
    command = [sys.executable, "-c", WAITING, str(YAML)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(1)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in errors
    assert "Traceback" not in errors
