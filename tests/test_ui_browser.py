"""`copernicus ui` in headless Chromium: what the printed links open. Screenshots go to the folder that
COPERNICUS_SCREENSHOTS names, or to pytest's temporary one."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from copernicus.platform import tracking
from copernicus.platform.tracking import Run, Tracker

pytestmark = pytest.mark.browser

TRIALS = {("pretrained", 1): 81.25, ("pretrained", 2): 79.5, ("random", 1): 64.75, ("random", 2): 61.0}
"""Overall accuracy of each (encoder, seed), percent."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_answering(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        assert process.poll() is None, f"the process behind {url} ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end, f"no answer from {url} in {seconds} s"
            time.sleep(0.2)


def end_group(process: subprocess.Popen, how: signal.Signals, seconds: float = 30) -> bool:
    """Signal the process alone, not its group; whether then the whole group went away. What stayed is killed."""
    process.send_signal(how)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return False


class Browser:
    """Headless Chromium through chromedriver's W3C WebDriver interface (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, driver: str, session: dict[str, Any], screenshots: Path):
        self.driver = driver
        self.screenshots = screenshots
        self.session = f"/session/{self._call('POST', '/session', session)['sessionId']}"

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.driver + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"WebDriver: {error.read().decode()[:2000]}") from None

    def open(self, url: str) -> None:
        # By way of a blank page: an address that differs after the # alone would not load anew.
        self._call("POST", f"{self.session}/url", {"url": "about:blank"})
        self._call("POST", f"{self.session}/url", {"url": url})

    def js(self, code: str, *arguments: Any) -> Any:
        return self._call("POST", f"{self.session}/execute/sync", {"script": code, "args": list(arguments)})

    def text(self) -> str:
        return self.js("return document.body.innerText")

    def until(self, code: str, *arguments: Any, seconds: float = 60) -> Any:
        """What the JavaScript gives as soon as that is truthy."""
        end = time.monotonic() + seconds
        while not (value := self.js(code, *arguments)):
            assert time.monotonic() < end, f"never true: {code} {arguments}; the page says:\n{self.text()}"
            time.sleep(0.2)
        return value

    def shows(self, *words: str) -> None:
        """Waits until the page's visible text holds all the words."""
        self.until("return arguments[0].every(w => document.body.innerText.includes(w))", words)

    def shot(self, name: str) -> None:
        picture = self._call("GET", f"{self.session}/screenshot")
        (self.screenshots / f"{name}.png").write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        self._call("DELETE", self.session)


@dataclass
class Page:
    """A store and the address at which it is served."""

    address: str
    tracker: Tracker
    parent: Run
    pretrain: Run
    sweep: Run
    trials: dict[str, Run]  # by name


def fill(tracker: Tracker, folder: Path) -> dict[str, Any]:
    """A pipeline's runs, as the platform records them."""
    parent = tracker.start("tiny pipeline", {"kind": "pipeline"})
    pretrain = tracker.start("pretrain", {"kind": "pretrain"}, parent)
    pretrain.metric_rows([(step, {"train/loss": 1 / (1 + step), "val/loss": 1.1 / (1 + step)}) for step in range(20)])
    picture = folder / "s2_toa.png"
    matplotlib.image.imsave(picture, np.linspace(0, 1, 37 * 53).reshape(37, 53))
    pretrain.artifact(picture, "reconstructions")
    pretrain.end()
    sweep = tracker.start("sweep", {"kind": "sweep"}, parent)
    trials = {}
    for (encoder, seed), score in TRIALS.items():
        name = f"eurosat_s2 {encoder} final {seed}"
        trials[name] = trial = tracker.start(name, {"kind": "trial", "encoder": encoder, "seed": seed}, sweep)
        trial.parameters({"encoder": encoder, "lr": 0.1 if encoder == "random" else 0.03, "task": "eurosat_s2"})
        trial.metrics({"test/oa": score}, step=3)
        trial.metric_rows([(epoch, {"train_loss": 2 - score / 100 - 0.1 * epoch}) for epoch in range(3)])
        trial.end()
    sweep.end()
    parent.end()
    return {"parent": parent, "pretrain": pretrain, "sweep": sweep, "trials": trials}


@contextmanager
def serving(uri: str, port: int, log: Path) -> Iterator[subprocess.Popen]:
    """The real command, in a process group of its own."""
    command = [sys.executable, "-c", "from copernicus.platform.cli import main; main()", "ui", "--uri", uri]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A background job's shell has Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_until_answering(f"http://127.0.0.1:{port}/health", process)
        yield process
    finally:
        if process.poll() is None:
            end_group(process, signal.SIGTERM)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tracker, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("store")
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}", "copernicus", folder / "artifacts")
    return folder, tracker, fill(tracker, folder)


@pytest.fixture(scope="module")
def page(store: tuple[Path, Tracker, dict[str, Any]]) -> Iterator[Page]:
    folder, tracker, runs = store
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, serving(tracker.uri, port, folder / "ui.log"):
        patch.setattr(tracking, "DEFAULT_PORT", port)  # the links lead to the port served here
        yield Page(f"http://127.0.0.1:{port}", tracker, **runs)


@pytest.fixture
def browser(page: Page, tmp_path: Path) -> Iterator[Browser]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium: install Debian's packages chromium and chromium-driver")
    screenshots = Path(os.environ.get("COPERNICUS_SCREENSHOTS", tmp_path / "screenshots"))
    screenshots.mkdir(parents=True, exist_ok=True)
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync window-size=1200,900"
    arguments = [f"--{s}" for s in switches.split()] + [f"--user-data-dir={tmp_path / 'profile'}"]
    options = {"args": arguments, "binary": chromium}
    port = free_port()
    process = subprocess.Popen([chromedriver, f"--port={port}"], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until_answering(f"http://127.0.0.1:{port}/status", process)
        session = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        browser = Browser(f"http://127.0.0.1:{port}", session, screenshots)
        try:
            # A first visit opens a chat panel over a third of the page: say that it was shown before.
            browser.open(f"{page.address}/health")
            browser.js("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
            yield browser
        finally:
            browser.close()
    finally:
        end_group(process, signal.SIGTERM)


def test_compare_link_shows_every_run_its_scores_and_a_chart(page: Page, browser: Browser) -> None:
    browser.open(page.tracker.compare_link([run.id for run in page.trials.values()]))
    browser.shows("Comparing 4 Runs from 1 Experiment", "Model registry", *page.trials)
    browser.shows("test/oa", "train_loss", *(str(score) for score in TRIALS.values()))
    # The plot that opens first: one axis for each parameter that differs, and one for the metric recorded first.
    axes = "return [...document.querySelectorAll('.js-plotly-plot .axis-title')].map(e => e.textContent)"
    browser.until(f"{axes}.length == 3")
    assert browser.js(axes) == ["encoder", "lr", "test/oa"]
    browser.shot("compare")


def test_experiment_page_nests_trials_below_their_sweep_below_its_pipeline(page: Page, browser: Browser) -> None:
    # Where the run's link leads, one level up.
    link, _, query = page.tracker.run_link(page.parent).partition("?")
    browser.open(f"{link.partition('/runs/')[0]}?{query}")
    left = (
        "const link = document.querySelector(`.ag-row a[href*='/runs/${arguments[0]}']`);"
        "return link && link.getBoundingClientRect().left"
    )
    expand = "document.querySelector(`.ag-row[row-id='${arguments[0]}'] button`).click()"
    top = browser.until(left, page.parent.id)
    assert browser.js(left, page.sweep.id) is None
    browser.js(expand, page.parent.id)
    below = browser.until(left, page.sweep.id)
    assert browser.until(left, page.pretrain.id) == below > top
    browser.js(expand, page.sweep.id)
    assert all(browser.until(left, trial.id) > below for trial in page.trials.values())
    browser.shows("tiny pipeline", "pretrain", "sweep", *page.trials)
    browser.shot("experiment")


def test_run_link_shows_metrics_parent_and_pictures(page: Page, browser: Browser) -> None:
    browser.open(page.tracker.run_link(page.pretrain))
    browser.shows("pretrain", "Finished", "Parent run", "tiny pipeline", "Metrics (2)", "train/loss", "val/loss")
    browser.shot("run")
    link, _, query = page.tracker.run_link(page.pretrain).partition("?")
    browser.open(f"{link}/model-metrics?{query}")
    # The curves as drawn, against the store's history.
    drawn = (
        "const plots = [...document.querySelectorAll('.js-plotly-plot')].map(plot => plot.data[0].y);"
        "return plots.length == 2 && plots.every(y => y.length == 20) && plots"
    )
    expected = [[value for _, value in page.tracker.history(page.pretrain, f"{s}/loss")] for s in ("train", "val")]
    np.testing.assert_allclose(browser.until(drawn), expected)
    browser.shot("run_metrics")
    browser.open(f"{link}/artifacts/reconstructions/s2_toa.png?{query}")
    # The picture itself, at its own size: a broken one has none.
    browser.until("return [...document.images].some(i => i.naturalWidth == 53 && i.naturalHeight == 37)")
    browser.shot("run_artifact")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_ui_leaves_no_server_behind(
    how: signal.Signals, store: tuple[Path, Tracker, dict[str, Any]], tmp_path: Path
) -> None:
    _, tracker, _ = store
    with serving(tracker.uri, free_port(), tmp_path / "ui.log") as process:
        assert end_group(process, how), (tmp_path / "ui.log").read_text()
        assert process.returncode == 0
