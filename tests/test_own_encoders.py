"""Encoders from elsewhere: the one that CONTRIBUTING.md shows, as it stands there, and what is wrong with others."""

import re
import sys
from pathlib import Path

import pytest
import torch
from bench_files import write_eurosat

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models import create_encoder, create_model, raw_values
from copernicus.platform.cell import encode_cell
from copernicus.platform.experiment import ExperimentError, load_experiment
from copernicus.platform.sweep import cells

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLE, YAML = re.findall(r"```(?:python|yaml)\n(.*?)```", GUIDE.split("## Bringing your own encoder")[1], re.DOTALL)[
    :2
]
S2 = SENSORS["s2_toa"]

BROKEN = """
from torch import nn

class Mute(nn.Module):
    inputs = "anything"
    def encode(self, x, sensor, metadata=None, normalize=True): ...
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on the path with the guide's module and two bad ones."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "my_encoders.py").write_text(EXAMPLE)
    (folder / "broken_encoders.py").write_text(BROKEN)
    (folder / "failing_encoders.py").write_text("import no_such_package_of_mine\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("my_encoders", "broken_encoders", "failing_encoders"):
        sys.modules.pop(name, None)


def experiment(folder, *overrides):
    (folder / "bench").mkdir(parents=True, exist_ok=True)
    text = f"name: own\nkind: sweep\n{YAML}  data: {folder}/bench\n  cache: {folder}/cache\n  tasks: [eurosat_s2]\n"
    (folder / "own.yaml").write_text(text)
    return load_experiment(folder / "own.yaml", overrides)


def test_the_guide_s_encoder_serves_a_sweep(modules, tmp_path):
    write_eurosat(
        tmp_path / "bench/eurosat_s2", {split: [("River", i)] for i, split in enumerate(("train", "val", "test"))}
    )
    settings = experiment(tmp_path, "sweep.image_size={eurosat_s2: 64}").sweep
    (cell,) = cells(settings, None, None)
    features = encode_cell(cell, settings)
    assert features.dims == (64,)
    split = features.splits["train"]
    dataset = TASKS["eurosat_s2"].open(tmp_path / "bench", "train", image_size=64)
    x_CHW, spec = dataset[0]["image"], TASKS["eurosat_s2"].sensor
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    blue_green_red_nir = (x_CHW * std + mean)[[1, 2, 3, 7]] / 10000
    network = create_encoder("my_encoders:FourBands", spec).network
    with torch.inference_mode():
        expected = network(blue_green_red_nir[None]).mean((-2, -1))[0]
    torch.testing.assert_close(torch.tensor(split.levels[0][0, 0]), expected, rtol=1e-4, atol=1e-5)


def test_raw_values_are_the_inverse_of_normalising():
    for sensor in SENSORS.values():
        raw = torch.rand(2, sensor.channels, 4, 4, generator=torch.Generator().manual_seed(0)) * 100
        torch.testing.assert_close(raw_values(sensor.normalize(raw), sensor), raw, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.tasks=[eurosat_s2, flood_s1]", ["encoders.mine: task flood_s1", "takes Sentinel-2 in", "(VV, VH)"]),
        ("sweep.encoders.mine.model.name=my_encoders:FiveBands", ["cannot be imported", "FiveBands"]),
        ("sweep.encoders.mine.model.name=nowhere.at.all:Encoder", ["cannot be imported", "nowhere", "PYTHONPATH"]),
        ("sweep.encoders.mine.model.name=failing_encoders:Any", ["cannot be imported", "no_such_package_of_mine"]),
        ("sweep.encoders.mine.model.name=broken_encoders:Mute", ["has no takes, encode_dense", "models.Encoder"]),
        ("sweep.encoders.mine.model.name='os:system(1)'", ["no encoder 'os:system(1)'", "package.module:Class"]),
        ("sweep.encoders.mine.model.name='../x:Y'", ["no encoder '../x:Y'"]),
        ("sweep.encoders.mine.model.depth=3", ["has no argument depth; it has sensor, seed"]),
        ("sweep.encoders.mine.language=words.pt", ["has no argument language"]),
        ("sweep.encoders.mine.model={name: vit_small, depth: 0}", ["depth", "positive"]),
        ("sweep.encoders.mine={model: {name: dofa_base}, language: words.pt}", ["'dofa_base' has no argument language"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(modules, tmp_path, override, words):
    with pytest.raises(ExperimentError) as caught:
        experiment(tmp_path, override)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_task_whose_sensor_dofa_does_not_take_is_refused(tmp_path):
    variable = next(task.name for task in TASKS.values() if not task.sensor.spectral)
    with pytest.raises(ExperimentError, match=rf"task {variable}: encoder 'dofa_base' takes sensors with wavelengths"):
        experiment(tmp_path, "sweep.encoders.mine.model.name=dofa_base", f"sweep.tasks=[eurosat_s2, {variable}]")
    assert experiment(tmp_path, "sweep.encoders.mine.model.name=vit_base", f"sweep.tasks=[eurosat_s2, {variable}]")


def test_own_encoders_are_for_sweeps(modules, tmp_path):
    with pytest.raises(ExperimentError, match=r"pretrain.model.name: no 'my_encoders:FourBands'"):
        experiment(tmp_path, f"pretrain={{shards: ['{tmp_path}'], model: {{name: 'my_encoders:FourBands'}}}}")
    with pytest.raises(ExperimentError, match=r"pretrain.model.name: no 'dofa_base'"):
        experiment(tmp_path, f"pretrain={{shards: ['{tmp_path}'], model: {{name: dofa_base}}}}")
    with pytest.raises(InputError, match="no model 'my_encoders:FourBands'"):
        create_model("my_encoders:FourBands")


def test_what_the_experiment_pretrains_is_not_called_another_model(tmp_path):
    small = f"pretrain={{shards: ['{tmp_path}'], model: {{name: copernicus_fm_small, depth: 2}}}}"
    for other in ("{name: dofa_small, depth: 2}", "{name: copernicus_fm_small}"):
        with pytest.raises(ExperimentError, match=r"mine.model: this experiment pretrains copernicus_fm_small .*depth"):
            experiment(tmp_path, "kind=pipeline", small, f"sweep.encoders.mine={{weights: pretrain, model: {other}}}")
    same = "sweep.encoders.mine={weights: pretrain, model: {name: copernicus_fm_small, depth: 2}}"
    assert experiment(tmp_path, "kind=pipeline", small, same)
