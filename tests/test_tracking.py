"""What is recorded in MLflow, read back with MLflow's own client from a store of its own."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import ErrorCode
from tracking_server import LossyWay, TrackingServer

from copernicus.datasets.sensors import InputError
from copernicus.platform.tracking import Tracker, mask, may_pass


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def tracker(store) -> Tracker:
    return Tracker(f"sqlite:///{store}/below/mlflow.db", "trials", store / "artifacts")


@pytest.fixture(scope="module")
def client(tracker) -> MlflowClient:
    """MLflow's own view of the store."""
    return MlflowClient(tracker.uri)


def test_the_store_and_its_experiment_are_made_once(tracker, client, store):
    assert (store / "below" / "mlflow.db").exists()
    again = Tracker(tracker.uri, "trials", store / "elsewhere")
    assert again.experiment_id == tracker.experiment_id
    experiment = client.get_experiment(tracker.experiment_id)
    assert experiment.artifact_location == (store / "artifacts").as_uri()
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_runs_nest_and_carry_their_tags(tracker, client):
    parent = tracker.start("pipeline", {"kind": "pipeline", "seed": 3})
    child = tracker.start("sweep", {"kind": "sweep"}, parent)
    grandchild = tracker.start("trial", {"kind": "trial", "task": "flood_s1"}, child)
    runs = {r.info.run_id: r for r in client.search_runs([tracker.experiment_id])}
    assert runs[parent.id].info.run_name == "pipeline"
    assert runs[parent.id].data.tags["seed"] == "3"
    assert "mlflow.parentRunId" not in runs[parent.id].data.tags
    assert runs[child.id].data.tags["mlflow.parentRunId"] == parent.id
    assert runs[grandchild.id].data.tags["mlflow.parentRunId"] == child.id
    found = client.search_runs([tracker.experiment_id], "tags.kind = 'trial' and tags.task = 'flood_s1'")
    assert [r.info.run_id for r in found] == [grandchild.id]


def test_metrics_keep_their_steps_and_the_last_one_is_found(tracker, client):
    run = tracker.start("metrics", {})
    assert tracker.last_step(run, "train/loss") == -1
    run.metric_rows([(2, {"train/loss": 0.5, "val/loss": 0.7}), (1, {"train/loss": 0.8})])
    run.metrics({"train/loss": 0.25}, step=5)
    assert tracker.history(run, "train/loss") == [(1, 0.8), (2, 0.5), (5, 0.25)]
    assert tracker.last_step(run, "train/loss") == 5
    assert tracker.last_step(run, "val/loss") == 2
    assert client.get_run(run.id).data.metrics == {"train/loss": 0.25, "val/loss": 0.7}


def test_more_than_one_request_holds_is_recorded_whole(tracker, client):
    """MLflow takes 1000 metrics and 100 parameters at a time."""
    run = tracker.start("many", {})
    run.metric_rows([(step, {"a": step, "b": -step}) for step in range(1100)])
    assert tracker.history(run, "a") == [(s, float(s)) for s in range(1100)]
    assert tracker.history(run, "b")[-1] == (1099, -1099.0)
    run.parameters({f"p{i}": i for i in range(230)})
    assert client.get_run(run.id).data.params == {f"p{i}": str(i) for i in range(230)}


def test_a_resumed_run_is_the_same_run_and_keeps_its_parameters(tracker, client):
    run = tracker.start("interrupted", {"kind": "pretrain"})
    run.parameters({"pretrain.workers": 2, "pretrain.epochs": 5, "long": "x" * 10_000})
    run.end("KILLED")
    resumed = tracker.start("interrupted", {"kind": "pretrain"}, run_id=run.id)
    assert resumed.id == run.id
    assert client.get_run(run.id).info.status == "RUNNING"
    resumed.parameters({"pretrain.workers": 1, "pretrain.epochs": 5, "pretrain.blr": 0.1, "long": "x" * 10_000})
    data = client.get_run(run.id).data
    assert data.params == {"pretrain.workers": "2", "pretrain.epochs": "5", "pretrain.blr": "0.1", "long": "x" * 6000}
    assert {k: v for k, v in data.tags.items() if k.startswith("changed.")} == {"changed.pretrain.workers": "1"}


def test_a_run_that_is_gone_is_not_resumed(tracker, client):
    run = tracker.start("deleted", {})
    client.delete_run(run.id)
    assert tracker.find(run.id) is None
    assert tracker.find("0" * 32) is None
    other = tracker.start("again", {}, run_id=run.id)
    assert other.id != run.id
    assert tracker.find(other.id) is not None


def test_a_run_ends_as_what_happened_inside(tracker, client):
    with tracker.start("fine", {}).ending() as fine:
        pass
    failed, killed = tracker.start("failed", {}), tracker.start("killed", {})
    with pytest.raises(RuntimeError), failed.ending():
        raise RuntimeError("no such luck")
    with pytest.raises(KeyboardInterrupt), killed.ending():
        raise KeyboardInterrupt
    infos = [client.get_run(run.id) for run in (fine, failed, killed)]
    assert [i.info.status for i in infos] == ["FINISHED", "FAILED", "KILLED"]
    assert all(i.info.end_time for i in infos)
    assert infos[1].data.tags["error"] == "RuntimeError: no such luck"
    assert "error" not in infos[0].data.tags


def test_artifacts_are_kept_beside_the_store(tracker, client, store, tmp_path):
    run = tracker.start("artifacts", {})
    (tmp_path / "picture.png").write_bytes(b"pixels")
    run.artifact(tmp_path / "picture.png", "reconstructions")
    run.text("name: trial\n", "experiment.yaml")
    kept = store / "artifacts" / run.id / "artifacts"
    assert (kept / "reconstructions" / "picture.png").read_bytes() == b"pixels"
    assert (kept / "experiment.yaml").read_text() == "name: trial\n"
    assert {a.path for a in client.list_artifacts(run.id)} == {"reconstructions", "experiment.yaml"}


def test_links_lead_to_the_page_of_the_store(tracker):
    run = tracker.start("linked", {})
    assert tracker.run_link(run).startswith(
        f"http://127.0.0.1:5000/#/experiments/{tracker.experiment_id}/runs/{run.id}"
    )
    link = tracker.compare_link([run.id, "b"])
    assert link.startswith("http://127.0.0.1:5000/#/compare-runs?")
    assert f'runs=["{run.id}","b"]' in unquote(link)
    assert f'experiments=["{tracker.experiment_id}"]' in unquote(link)
    assert not set(link) & set('[]", '), "a terminal would cut the link there"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("http://someone@host:5000", "http://someone@host:5000"),
        ("http://someone:secret@host:5000", "http://someone:***@host:5000"),
        ("postgresql://someone:secret@host/db", "postgresql://someone:***@host/db"),
        ("postgresql+psycopg2://:secret@host/db", "postgresql+psycopg2://:***@host/db"),
        ("http://someone:sec@ret@host:99999", "http://someone:***@host:99999"),
        ("http://someone:sec/ret@host", "http://someone:***@host"),
        ("postgresql://host/db?password=secret&sslmode=require", "postgresql://host/db?password=***&sslmode=require"),
        ("cannot reach http://a:secret@b/x at all", "cannot reach http://a:***@b/x at all"),
    ],
)
def test_passwords_are_masked(text, expected):
    assert mask(text) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:secret@127.0.0.1:1",
        "http://user:secret@127.0.0.1:99999",
        "postgresql://user:secret@127.0.0.1:1/db",
        "mysql+pymysql://user:secret@127.0.0.1:1/db",
    ],
)
def test_a_store_out_of_reach_is_said_within_seconds_and_without_the_password(uri):
    started = time.monotonic()
    with pytest.raises(InputError, match=r"tracking\.uri: cannot use .*user:\*\*\*@127\.0\.0\.1") as caught:
        Tracker(uri, "trials")
    assert time.monotonic() - started < 30
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["sqlite:////proc/none/mlflow.db", "sqlite:///{}/text.db", "ftp://x", "{}/mlruns"])
def test_what_is_no_store_is_refused_at_once(uri, tmp_path):
    (tmp_path / "text.db").write_text("this is no database " * 100)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"tracking\.uri: cannot use") as caught:
        Tracker(uri.format(tmp_path), "trials")
    assert time.monotonic() - started < 15
    assert "\n" not in str(caught.value)


def test_a_deleted_experiment_is_not_written_to(tracker, client):
    client.delete_experiment(Tracker(tracker.uri, "old").experiment_id)
    with pytest.raises(InputError, match=r"tracking\.experiment: 'old' was deleted"):
        Tracker(tracker.uri, "old")


def answered(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("no", response=response)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MlflowException("API request to http://a failed with exception: connection refused"), True),
        (MlflowException("database is locked", ErrorCode.Value("TEMPORARILY_UNAVAILABLE")), True),
        (RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slowly"}), True),
        (RestException({"error_code": "INTERNAL_ERROR", "message": "oh"}), True),
        (requests.ConnectionError("reset"), True),
        (requests.ReadTimeout("20 s"), True),
        (answered(502), True),
        (answered(413), False),
        (RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}), False),
        (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}), False),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "no"}), False),
        (MlflowException("run is deleted", ErrorCode.Value("INVALID_STATE")), False),
        (ValueError("ours"), False),
    ],
)
def test_what_may_pass_is_tried_again_and_a_refusal_is_not(error, passes):
    assert may_pass(error) == passes


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_a_long_run_waits_out_an_outage(server, tmp_path, caplog):
    (tmp_path / "picture.png").write_bytes(b"pixels")
    with LossyWay(server.port) as way:
        tracker = Tracker(way.uri, "long")
        run = tracker.start("long", {"kind": "pretrain"})
        way.close()

        def back() -> None:
            way.open = True

        threading.Timer(1.5, back).start()
        run.metric_rows([(1, {"train/loss": 0.5})])  # while nothing answers
        way.lose = "runs/log-batch"
        run.metric_rows([(2, {"train/loss": 0.25})])
        way.lose = "runs/log-batch"
        run.parameters({"pretrain.epochs": 5})
        way.lose = "runs/create"
        child = tracker.start("child", {"kind": "sweep"}, run)
        way.lose = "mlflow-artifacts"
        run.artifact(tmp_path / "picture.png", "pictures")
        run.end()
        assert way.lost == 4
    client = MlflowClient(server.uri)
    assert [(m.step, m.value) for m in client.get_metric_history(run.id, "train/loss")] == [(1, 0.5), (2, 0.25)]
    assert {r.info.run_id for r in client.search_runs([tracker.experiment_id])} == {run.id, child.id}
    assert client.get_run(run.id).data.params == {"pretrain.epochs": "5"}
    assert [a.path for a in client.list_artifacts(run.id, "pictures")] == ["pictures/picture.png"]
    said = [r for r in caplog.records if r.name == "copernicus.tracking"]
    assert [r.levelno for r in said] == [logging.WARNING], "one outage, one line"


def test_patience_ends_and_what_happened_inside_is_what_is_raised(server, caplog):
    with LossyWay(server.port) as way:
        tracker = Tracker(way.uri, "impatient", patience=0.5)
        run, other = tracker.start("a", {}), tracker.start("b", {})
        way.close()
        with pytest.raises(MlflowException, match="failed with exception"):
            run.metrics({"loss": 1.0})
        with pytest.raises(RuntimeError, match="no such luck"), other.ending():
            raise RuntimeError("no such luck")
    assert f"{other.id} could not be marked FAILED" in caplog.text
