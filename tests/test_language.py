"""Embeddings of names from every kind of file; that runs use them, record them, and say where they have none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_encode import TINY, run
from test_pretrain import TINY as TINY_MODEL
from test_weights import model

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models import LanguageTable, load_weights
from copernicus.platform.checkpoint import trained_language
from copernicus.platform.experiment import ExperimentError, load_experiment
from copernicus.platform.language import language_warning, variables
from copernicus.platform.schema import Encoder, Pretrain, Sweep
from copernicus.platform.sweep import cells, cells_language

NAMES = ["Sentinel 5P Ozone", "Sentinel 5P Nitrogen Dioxide"]
VECTORS = {name: np.random.default_rng(i).standard_normal(2048).astype(np.float32) for i, name in enumerate(NAMES)}


def write(path: Path, vectors: dict[str, np.ndarray]) -> Path:
    tensors = {name: torch.from_numpy(v) for name, v in vectors.items()}
    if path.suffix in (".pt", ".pth"):
        torch.save(tensors, path)
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **vectors)
    else:
        path.write_text(json.dumps({name: v.tolist() for name, v in vectors.items()}))
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".npz", ".json"])
def test_every_kind_of_file_gives_the_same_vectors(tmp_path, suffix):
    path = write(tmp_path / f"words{suffix}", VECTORS)
    table = LanguageTable.load(path)
    for name, vector in VECTORS.items():
        assert table.vector(name).dtype == torch.float32
        assert np.array_equal(table.vector(name).numpy(), vector)
    assert table.digests(NAMES) == {n: hashlib.sha256(v.tobytes()).hexdigest()[:12] for n, v in VECTORS.items()}
    file = hashlib.sha256(path.read_bytes()).hexdigest()
    assert table.describe(NAMES) == f"sha256:{file[:12]}"
    assert table.describe([*NAMES, "Rain"]) == f"sha256:{file[:12]}; stand-in: Rain"
    assert LanguageTable().describe(NAMES) == f"stand-in: {', '.join(NAMES)}"


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_what_is_no_table_of_vectors_is_refused_and_nothing_runs(tmp_path):
    marker = tmp_path / "ran"
    np.savez(tmp_path / "evil.npz", Ozone=np.array([Payload(marker)], dtype=object))
    torch.save({"Ozone": Payload(marker)}, tmp_path / "evil.pt")
    np.savez(tmp_path / "text.npz", Ozone=np.array(["a"] * 2048))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    for name, content in {
        "list": [1.0], "ragged": {"Ozone": [[1.0], 2.0]}, "text": {"Ozone": "words"}, "short": {"Ozone": [1.0, 2.0]},
        "nan": {"Ozone": [float("nan")] * 2048}, "empty": {}, "none": {"Ozone": None},
    }.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "torn.json").write_text('{"Ozone": [1.0,')
    torch.save(torch.ones(2048), tmp_path / "bare.pt")
    files = sorted(p for p in tmp_path.iterdir())
    assert len(files) == 13
    for path in files:
        with pytest.raises(InputError) as caught:
            LanguageTable.load(path)
        assert "\n" not in str(caught.value), path
        assert path.name in str(caught.value) or "'Ozone'" in str(caught.value), path
    assert not marker.exists()


def test_warnings_name_stand_ins_and_other_embeddings():
    table = LanguageTable({NAMES[0]: torch.from_numpy(VECTORS[NAMES[0]])})
    assert variables(SENSORS.values())[2] == NAMES[0]
    assert language_warning(table, [NAMES[0]]) == ""
    assert language_warning(LanguageTable(), []) == ""
    line = language_warning(table, NAMES)
    assert repr(NAMES[1]) in line
    assert repr(NAMES[0]) not in line
    trained = table.digests(NAMES)
    assert trained[NAMES[1]] == "stand-in"
    assert "other" not in language_warning(table, NAMES, trained)
    line = language_warning(LanguageTable(), NAMES, trained)
    assert f"other language embeddings of {NAMES[0]!r}" in line
    # What is not used does not matter.
    assert language_warning(table, [NAMES[0]], {**trained, "Rain": "0123"}) == ""


def test_a_load_tells_of_other_embeddings(tmp_path):
    table = LanguageTable({n: torch.from_numpy(v) for n, v in VECTORS.items()})
    state = {
        "model": model(1).state_dict(),
        "architecture": {"name": "copernicus_fm_small"},
        "language": table.digests(NAMES),
    }
    torch.save(state, tmp_path / "c.pt")
    assert trained_language(tmp_path / "c.pt") == table.digests(NAMES)
    assert load_weights(model(language=table), tmp_path / "c.pt").other_language == ()
    report = load_weights(model(), tmp_path / "c.pt")
    assert report.other_language == tuple(NAMES)
    assert "other language embeddings" in str(report)


def test_encoding_with_others_warns_and_is_recorded(tmp_path):
    import pyarrow.parquet as pq
    import rasterio
    from rasterio.transform import from_origin

    path = tmp_path / "o3.tif"
    with rasterio.open(path, "w", driver="GTiff", count=1, height=28, width=28, dtype="float32", crs="EPSG:4326",
                       transform=from_origin(5, 50, 0.01, 0.01)) as file:  # fmt: skip
        file.write(np.random.default_rng(0).normal(0.15, 0.01, (1, 28, 28)).astype("float32"))
    words = write(tmp_path / "words.npz", VECTORS)
    table = LanguageTable.load(words)
    state = {"model": model(1, image_size=224).state_dict(), "architecture": {"name": "copernicus_fm_small"}}
    torch.save({**state, "language": table.digests(NAMES)}, tmp_path / "c.pt")
    weights = str(tmp_path / "c.pt")
    assert TINY == {"embed_dim": 32, "depth": 2, "num_heads": 4}
    summary, text = run([path], tmp_path / "a.parquet", "s5p_o3", weights, language=words)
    assert "stand-in" not in text
    assert "other language embeddings" not in text
    assert pq.read_schema(summary.embeddings).metadata[b"language"] == f"sha256:{table.origin}".encode()
    summary, text = run([path], tmp_path / "b.parquet", "s5p_o3", weights)
    assert "no language embedding for 'Sentinel 5P Ozone'" in text
    assert "pretrained with other language embeddings of 'Sentinel 5P Ozone'" in text
    assert pq.read_schema(summary.embeddings).metadata[b"language"] == b"stand-in: Sentinel 5P Ozone"


def test_a_sweep_s_cells_take_pretraining_s_embeddings_and_say_what_they_use(tmp_path):
    words = str(write(tmp_path / "words.json", VECTORS))
    sweep = Sweep(data="x", tasks=["aq_no2_s5p", "eurosat_s2"], encoders={
        "ours": Encoder(weights="pretrain"), "random": Encoder(model=TINY_MODEL)})  # fmt: skip
    torch.save(
        {
            "model": {},
            "architecture": {"name": "copernicus_fm_small"},
            "language": LanguageTable.load(words).digests(NAMES),
        },
        tmp_path / "c.pt",
    )
    plans = cells(sweep, Pretrain(shards=["x"], model=TINY_MODEL, language=words), tmp_path / "c.pt")
    assert [c.language for c in plans] == [words, None, words, None]
    described, warnings = cells_language(sweep, plans)
    assert set(described) == {"aq_no2_s5p-ours", "aq_no2_s5p-random"}
    assert described["aq_no2_s5p-ours"].startswith("sha256:")
    assert described["aq_no2_s5p-random"] == "stand-in: Sentinel 5P Nitrogen Dioxide"
    assert len(warnings) == 1
    assert warnings[0].startswith("encoder random: no language embedding")
    _, warnings = cells_language(sweep, [dataclasses.replace(plans[0], language=None)])
    assert "other language embeddings" in warnings[0]


def test_the_yaml_s_key_is_checked(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    text = f"kind: pretrain\npretrain:\n  shards: [{shards}]\n  language: {{}}\n"
    yaml = tmp_path / "e.yaml"
    (tmp_path / "words.npz").touch()
    for value, message in {"absent.pt": "no such file", str(tmp_path): "does not end in"}.items():
        yaml.write_text(text.format(value))
        with pytest.raises(ExperimentError, match=rf"pretrain\.language: .*{message}"):
            load_experiment(yaml)
    found = set()
    for value in (str(tmp_path / "words.npz"), "hf://own/model/words.pt", "null"):
        yaml.write_text(text.format(value))
        found.add(load_experiment(yaml).fingerprint)
    assert len(found) == 3, "embeddings decide the results"
