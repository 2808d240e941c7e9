"""The top-level folders are the packages: in a checkout they shadow nothing, and a wheel holds them whole."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("platform", "models", "datasets")


def python(code: str, folder: Path, path: Path | None = None, isolated: bool = False) -> str:
    """What a Python started in ``folder`` prints; ``isolated``: without installed packages of ours."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    hide = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        if isolated
        else ""
    )
    done = subprocess.run(
        [sys.executable, "-c", hide + code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", PACKAGES)
def test_no_top_level_folder_is_a_regular_package(name):
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists(), "it would shadow the other package of that name"


def test_in_a_checkout_platform_is_still_the_standard_library_s():
    printed = python("import platform; print(platform.system(), platform.__file__)", ROOT)
    system, file = printed.split(maxsplit=1)
    assert system == os.uname().sysname
    assert ROOT not in Path(file).parents


def test_in_a_checkout_datasets_is_still_the_installed_one(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("load_dataset = 'the other one'\n")
    code = "import datasets; print(datasets.load_dataset); from copernicus.datasets import SENSORS; print(len(SENSORS))"
    assert python(code, ROOT, tmp_path).split("\n") == ["the other one", "8"]


def test_a_module_of_a_package_is_imported_without_all_public_names(tmp_path):
    """Each process of an indexing job, and each command that only says what is wrong, would pay for torch and GDAL."""
    heavy = "('torch', 'rasterio', 'h5py', 'copernicus.datasets.api')"
    code = "import sys; from copernicus.datasets import stores; from copernicus.platform import data_jobs, indexing; "
    assert python(f"{code}print([m for m in {heavy} if m in sys.modules])", tmp_path) == "[]"


@pytest.mark.parametrize("name", ["models", "datasets"])
def test_every_public_name_is_there_and_no_other(name):
    import importlib

    package = importlib.import_module(f"copernicus.{name}")
    api = importlib.import_module(f"copernicus.{name}.api")
    assert api.__all__
    assert len(set(api.__all__)) == len(api.__all__)
    for public in api.__all__:
        assert getattr(package, public) is getattr(api, public)
        assert getattr(api, public) is not None
    with pytest.raises(AttributeError, match=r"nothing_of_the_kind.*it has"):
        package.nothing_of_the_kind  # noqa: B018


def test_platform_has_modules_only():
    import copernicus.platform

    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        copernicus.platform.nothing_of_the_kind  # noqa: B018


def test_importing_a_package_imports_no_torch():
    code = "import sys, copernicus.models, copernicus.datasets, copernicus.platform; print('torch' in sys.modules)"
    assert python(code, ROOT.parent) == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel's contents, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build leaves files beside the sources
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_every_module_and_the_marks_of_types(wheel):
    for name in PACKAGES:
        ours = {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*") if p.suffix in (".py", ".pyi", ".typed")}
        ours = {p for p in ours if p.parts[0] != "_package"}
        packed = {
            p.relative_to(wheel / "copernicus" / name) for p in (wheel / "copernicus" / name).rglob("*") if p.is_file()
        }
        assert ours <= packed, ours - packed
        assert not {p for p in packed if p.name == "__init__.py" and len(p.parts) == 1}
        assert Path("py.typed") in packed
    for name in ("models", "datasets"):
        assert (wheel / "copernicus" / name / "__init__.pyi").exists()
    assert (wheel / "copernicus" / "py.typed").exists()
    assert {p.name for p in wheel.iterdir() if p.suffix != ".dist-info"} == {"copernicus"}, "nothing else is installed"


def test_the_wheel_holds_the_files_of_clusters(wheel):
    ours = {p.name: p.read_bytes() for p in (ROOT / "platform" / "clusters").iterdir()}
    packed = {p.name: p.read_bytes() for p in (wheel / "copernicus" / "platform" / "clusters").iterdir()}
    assert ours == packed
    assert "mlflow_server.sh" in packed


def test_the_wheel_imports_from_a_bare_folder(wheel, tmp_path):
    code = (
        "from copernicus.models import create_model; from copernicus.datasets import SENSORS, TASKS; "
        "import copernicus.platform.experiment as e, copernicus.models.api as m, copernicus.datasets.bench as b; "
        "print(len(SENSORS), 'eurosat_s2' in TASKS, callable(create_model)); "
        "print(*(module.__file__ for module in (e, m, b)), sep='\\n')"
    )
    first, *files = python(code, tmp_path, wheel, isolated=True).split("\n")
    assert first == "8 True True"
    assert all(wheel in Path(file).parents for file in files), files


def test_the_command_is_installed(wheel):
    (points,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "copernicus = copernicus.platform.cli:main" in points.read_text()
