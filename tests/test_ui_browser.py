"""`copernicus ui` in headless Chromium: what the printed links open, with a few runs and with a sweep of 1,000 trials.
Screenshots go to the folder that COPERNICUS_SCREENSHOTS names, or to pytest's temporary one."""

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
import sqlalchemy

from copernicus.datasets.order import generator
from copernicus.platform import tracking
from copernicus.platform.spool import Spool
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


TASKS = [f"task_{i:02d}" for i in range(15)]
ENCODERS = ["mine", "published", "random"]
SEARCHED, SEEDS = 17, 5
"""Trials of each of 45 cells: 990 in all."""


@dataclass
class Sweep:
    tracker: Tracker
    run: Run
    finals: dict[tuple[str, str], list[str]]  # ids of the runs of the final estimate, by task and encoder


@pytest.fixture(scope="module")
def thousand(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep of 990 trials, spooled into the store that is being served."""
    folder = tmp_path_factory.mktemp("thousand")
    tracker = Tracker(page.tracker.uri, "thousand", folder / "artifacts")
    # The disk is not what is tried here.
    engine = tracker.client._tracking_client.store.engine
    sqlalchemy.event.listen(engine, "checkout", lambda c, *_: c.execute("PRAGMA synchronous = OFF"))
    cells = {"tasks": TASKS, "encoders": ENCODERS, "seeds": list(range(1, SEEDS + 1))}
    tags = {"sweep": "bench", "sweep_id": "bench-0a1b2c"}
    sweep = tracker.start("bench", {"kind": "sweep", "cells": json.dumps(cells), **tags})
    rng = generator("thousand trials")
    keys: dict[tuple[str, str], list[str]] = {}
    with Spool(tracker, folder) as spool:
        for task in TASKS:
            for encoder in ENCODERS:
                for number in range(SEARCHED + SEEDS):
                    role, seed = ("final", number - SEARCHED + 1) if number >= SEARCHED else ("search", 0)
                    lr, score = float(10 ** rng.uniform(-4, 0)), float(60 + 40 * rng.uniform())
                    key = f"{task}-{encoder}-{role}-{number}"
                    if role == "final":
                        keys.setdefault((task, encoder), []).append(key)
                    spool.add_run(
                        key, f"{task} {encoder} {role} {number}",
                        {"kind": "trial", "task": task, "encoder": encoder, "role": role, "seed": seed, **tags},
                        sweep.id, {"task": task, "encoder": encoder, "lr": lr, "model": "copernicus_fm_base"},
                        [(3, {"score": score, "val/oa": score}), *((e, {"val_oa": score - 3 + e}) for e in range(3))],
                        seconds=2.5,
                    )  # fmt: skip
    sweep.end()
    return Sweep(tracker, sweep, {cell: [str(spool.run_id(key)) for key in held] for cell, held in keys.items()})


ROWS = "[...document.querySelectorAll('.ag-center-cols-container .ag-row')]"
FOUND = "return Number((document.body.innerText.match(/(\\d+) matching run/) || [])[1])"


def listed(browser: Browser) -> set[str]:
    """Ids of the runs that the page has rows for."""
    links = "[...document.querySelectorAll('.ag-row a[href*=\"/runs/\"]')]"
    return set(browser.js(f"return {links}.map(a => a.getAttribute('href').split('/runs/')[1].split(/[?/]/)[0])"))


def test_a_thousand_trials_are_folded_into_their_sweep(thousand: Sweep, browser: Browser) -> None:
    link, _, query = thousand.tracker.run_link(thousand.run).partition("?")
    browser.open(f"{link.partition('/runs/')[0]}/runs?{query}")
    browser.until(f"return {ROWS}.length > 0")
    assert listed(browser) == {thousand.run.id}, "one row, whatever is below it"
    browser.shows("bench", "Load more")
    # A page of MLflow's, and the parent of its runs, which the page may fetch a moment later.
    assert browser.js(FOUND) in (100, 101)
    browser.shot("thousand")
    browser.js(f"document.querySelector(`.ag-row[row-id='{thousand.run.id}'] button`).click()")
    browser.until(f"return {ROWS}.length > 10")
    browser.shows("task_14 random final 21")  # the last one first
    browser.shot("thousand_open")


def test_a_filter_finds_trials_below_their_sweep(thousand: Sweep, browser: Browser) -> None:
    search = "tags.task = 'task_03' and tags.role = 'final' and tags.sweep_id = 'bench-0a1b2c'"
    browser.open(thousand.tracker.runs_link(search))
    browser.until(f"{FOUND} == 15")
    expected = {run for encoder in ENCODERS for run in thousand.finals["task_03", encoder]}
    browser.until(f"return {ROWS}.length >= 15")
    assert listed(browser) == expected, "each in a row of its own, not folded"
    browser.shot("thousand_filtered")


def test_a_view_shows_what_a_sweep_compares(thousand: Sweep, browser: Browser) -> None:
    search = "tags.kind = 'trial' and tags.task = 'task_03' and tags.sweep_id = 'bench-0a1b2c'"
    browser.open(thousand.tracker.view_link("bench-0a1b2c-task_03", search))
    browser.until(f"{FOUND} == 66")
    heads = "return [...document.querySelectorAll('.ag-header-cell')].map(e => e.innerText.trim())"
    browser.until(f"{heads}.includes('score')")
    assert {"encoder", "lr", "task", "score", "role", "seed"} <= set(browser.js(heads))
    browser.shot("thousand_view")
    browser.open(thousand.tracker.view_link("bench-0a1b2c-task_03", search, chart=True))
    labels = "return [...document.querySelectorAll('.parcoords .dimension .label')].map(e => e.textContent)"
    browser.until(f"{labels}.length == 4")
    assert browser.js(labels) == ["task", "encoder", "lr", "score"]
    browser.shows("Showing all runs", *ENCODERS)
    browser.shot("thousand_chart")


def test_a_view_groups_seeds_by_task_and_encoder(thousand: Sweep, browser: Browser) -> None:
    search = "tags.role = 'final' and tags.encoder = 'mine' and tags.sweep_id = 'bench-0a1b2c'"
    browser.open(thousand.tracker.view_link("bench-0a1b2c", search, group_by=("task", "encoder")))
    browser.until(f"{FOUND} == 75")
    browser.shows("Group by: task", "Group: task:", "(average)")
    browser.shot("thousand_grouped")


def test_compare_holds_all_final_trials_of_a_sweep(thousand: Sweep, browser: Browser) -> None:
    runs = [run for held in thousand.finals.values() for run in held]
    assert len(runs) == 225
    browser.open(thousand.tracker.compare_link(runs))
    browser.shows("Comparing 225 Runs from 1 Experiment")
    axes = "return [...document.querySelectorAll('.js-plotly-plot .axis-title')].map(e => e.textContent)"
    browser.until(f"{axes}.length == 4")
    assert browser.js(axes) == ["encoder", "lr", "task", "score"]
    browser.shot("thousand_compare")
