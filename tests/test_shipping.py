"""What a job carries: what a wheel holds, the YAML as written, the same bytes each time, and never data."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_packaging import wheel  # noqa: F401 (fixture)

from copernicus.datasets.sensors import InputError
from copernicus.platform import shipping
from copernicus.platform.shipping import COMMIT, EXPERIMENT, pack, package_files

YAML = "name: mine\nkind: sweep\nsweep: {data: '${oc.env:BENCH_FOLDER}'}  # as it is\n"


@pytest.fixture
def experiment(tmp_path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(YAML)
    return file


def unpacked(content: bytes, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    return folder


def test_it_is_what_a_wheel_holds(wheel):  # noqa: F811
    held = {str(p.relative_to(wheel)) for p in (wheel / "copernicus").rglob("*") if p.is_file()}
    assert {name for name, _ in package_files()} == held


def test_the_yaml_travels_as_written(experiment, tmp_path):
    folder = unpacked(pack(experiment, "abc123").content, tmp_path / "there")
    assert (folder / EXPERIMENT).read_text() == YAML
    assert (folder / COMMIT).read_text() == "abc123\n"


def test_the_same_contents_are_the_same_bytes(experiment):
    first = pack(experiment, "abc")
    os.utime(experiment, (1, 1))
    assert pack(experiment, "abc") == first
    experiment.write_text(YAML + "seed: 1\n")
    other = pack(experiment, "abc")
    assert other.uri != first.uri


def test_the_shipped_package_wins_over_the_installed_one(experiment, tmp_path):
    """From another folder, by PYTHONPATH, as Ray's workers import it."""
    folder = unpacked(pack(experiment, "abc123").content, tmp_path / "there")
    code = (
        "import copernicus, copernicus.platform.tracking as t, copernicus.datasets.bench, copernicus.models.zoo;"
        "print(copernicus.__file__, t.__file__, t.git_commit())"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    package, tracking, commit = done.stdout.split()
    assert Path(package) == folder / "copernicus" / "__init__.py"
    assert Path(tracking) == folder / "copernicus" / "platform" / "tracking.py"
    assert commit == "abc123"


def test_nothing_else_travels(experiment):
    with zipfile.ZipFile(io.BytesIO(pack(experiment, "abc").content)) as archive:
        names = archive.namelist()
    assert not [n for n in names if "__pycache__" in n or "tests" in n or n.endswith((".pyc", ".tar", ".pth"))]
    assert [n for n in names if not n.startswith("copernicus/")] == [EXPERIMENT]


def test_a_folder_of_data_in_the_checkout_stays_behind(experiment, tmp_path, monkeypatch):
    """The repository's folder is called datasets: people put data there."""
    import copernicus.datasets

    folder = tmp_path / "datasets"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "notes.py").write_text("")
    (folder / "shard.tar").write_bytes(b"x" * 1000)
    (folder / "sensors.py").write_text("")
    monkeypatch.setattr(copernicus.datasets, "__path__", [str(folder)])
    names = [name for name, _ in package_files() if name.startswith("copernicus/datasets/")]
    assert names == ["copernicus/datasets/sensors.py"]


def test_too_large_is_refused_and_what_is_large_named(experiment, monkeypatch):
    monkeypatch.setattr(shipping, "LIMIT_BYTES", 2**20)
    experiment.write_text(YAML + "# " + os.urandom(2**20).hex())
    with pytest.raises(InputError, match=r"MiB, and Ray takes 1; the largest files: experiment\.yaml \(2\.0 MiB\)"):
        pack(experiment, "abc")
