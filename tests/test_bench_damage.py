"""Benchmark files that are missing, damaged or not what they should be: one message that names the file."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from bench_files import noise_air, noise_bigearthnet, noise_cloud_s2, noise_dfc, noise_lc100, noise_lcz, write_tif

from copernicus.datasets import TASKS, InputError, get_task


def fails(name: str, folder: Path, *parts: str, read: bool = False) -> None:
    """Opening (or reading the first sample) raises InputError with one line that has these parts, in this order."""
    task = get_task(name)
    if read:
        dataset = task.open(folder, "val")
        with pytest.raises(InputError) as caught:
            dataset[0]
    else:
        with pytest.raises(InputError) as caught:
            task.open(folder, "val")
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, parts)), message), message
    assert "\n" not in message.strip()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..", "a\\b"])
def test_names_do_not_lead_out_of_the_folder(tmp_path, name):
    noise_cloud_s2(tmp_path / "cloud_s2")
    (tmp_path / "cloud_s2/val.csv").write_text(f"{name}\n")
    fails("cloud_s2", tmp_path, "val.csv is not as expected", "leads out of the task's folder")
    noise_lc100(tmp_path / "lc100_s3")
    pid = (tmp_path / "lc100_s3/static_fnames-val.csv").read_text().split(",")[0]
    (tmp_path / "lc100_s3/static_fnames-val.csv").write_text(f"{pid},{name}\n")
    fails("lc100cls_s3", tmp_path, "static_fnames-val.csv is not as expected", "leads out")
    (tmp_path / "flood_s1").mkdir()
    escaped = name.replace("\\", "\\\\")
    (tmp_path / "flood_s1/grid_dict_val.json").write_text(f'{{"a": {{"path": "x/../../{escaped}"}}}}')
    fails("flood_s1", tmp_path, "grid_dict_val.json is not as expected", "leads out")


def test_label_lists(tmp_path):
    noise_bigearthnet(tmp_path, count=3)
    path = tmp_path / "multilabel-val.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-2], lines[3]]))
    fails("bigearthnet_s1", tmp_path, "multilabel-val.csv is not as expected", "line 3 has 20 columns, expected 21")
    path.write_text("\n".join([*lines[:3], lines[3][:-1] + "7"]))
    fails("bigearthnet_s2", tmp_path, "multilabel-val.csv is not as expected", "line 4: a label other than 0 or 1")
    path.write_text(lines[0] + "\n")
    fails("bigearthnet_s2", tmp_path, "multilabel-val.csv lists no samples")
    path.write_bytes(b"\xff\xfe\x00broken")
    fails("bigearthnet_s2", tmp_path, "multilabel-val.csv is not as expected")


@pytest.mark.parametrize("text", ['["a"]', '{"a": 3}', '{"a": {}}', "[", "3"])
def test_grid_dictionaries(tmp_path, text):
    (tmp_path / "grid_dict_val.json").write_text(text)
    fails("flood_s1", tmp_path, "grid_dict_val.json is not as expected")


def test_lists_of_static_images(tmp_path):
    noise_lc100(tmp_path)
    static = tmp_path / "static_fnames-val.csv"
    lines = static.read_text().splitlines()
    static.write_text(lines[0] + "\n")
    fails("lc100cls_s3", tmp_path, "static_fnames-val.csv names no image for 0200600_val", "multilabel-val.csv")
    static.write_text(lines[0] + ",x\n")
    fails("lc100seg_s3", tmp_path, "static_fnames-val.csv is not as expected", "line 1 has 3 columns, expected 2")
    static.unlink()
    fails("lc100cls_s3", tmp_path, "static_fnames-val.csv cannot be read", "expected lc100_s3/multilabel-<split>.csv")
    assert len(get_task("lc100cls_s3-series").open(tmp_path, "val")) == 2  # which does not use that list


def test_a_place_without_images(tmp_path):
    noise_lc100(tmp_path)
    for path in (tmp_path / "s3_olci").glob("*val*/*.tif"):
        path.unlink()
    fails("lc100cls_s3-series", tmp_path, "*.tif matches 0 files, expected 1 or more (and 1 more)")
    fails("lc100cls_s3", tmp_path, "S3A_20190507T135736_20190507T135744.tif is missing (and 1 more)")


def test_the_folder_of_another_task(tmp_path):
    noise_air(tmp_path / "airquality_s5p/o3", "o3")
    fails("aq_no2_s5p", tmp_path / "airquality_s5p/o3", "val.csv lists EEA_1kmgrid_2021_o3_avg_val_13", "another task")
    fails("aq_no2_s5p", tmp_path, "no split file val.csv", "airquality_s5p/no2/<split>.csv")
    noise_cloud_s2(tmp_path / "cloud_s2")
    fails("cloud_s3", tmp_path / "cloud_s2", "s3_olci", "is missing", "expected cloud_s3/<split>.csv")


def test_images_and_labels_that_do_not_fit(tmp_path):
    noise_cloud_s2(tmp_path)
    name = (tmp_path / "val.csv").read_text().strip()
    image, label = tmp_path / f"s2_toa/{name}.tif", tmp_path / f"cloud/{name}.tif"
    write_tif(label, np.zeros((1, 30, 32), np.uint8), 32632, 5e5, 5.3e6, 10)
    fails("cloud_s2", tmp_path, f"cloud/{name}.tif: 30 x 32 pixels do not fit the 32 x 32 of", "s2_toa", read=True)
    write_tif(label, np.zeros((2, 32, 32), np.uint8), 32632, 5e5, 5.3e6, 10)
    fails("cloud_s2", tmp_path, f"cloud/{name}.tif: 2 bands, a label has 1", read=True)
    write_tif(image, np.zeros((12, 32, 32), np.uint16), 32632, 5e5, 5.3e6, 10)
    write_tif(label, np.zeros((1, 32, 32), np.uint8), 32632, 5e5, 5.3e6, 10)
    fails("cloud_s2", tmp_path, f"s2_toa/{name}.tif: 12 bands, expected 13 (B01, B02", read=True)
    whole = label.read_bytes()
    label.write_bytes(whole[: len(whole) // 2])
    fails("cloud_s2", tmp_path, f"cloud/{name}.tif: cannot be read as GeoTIFF", read=True)
    noise_lc100(tmp_path / "lc100_s3", size=10, label_size=32)
    (label,) = (tmp_path / "lc100_s3/lc100").glob("0200599_val*.tif")
    write_tif(label, np.zeros((1, 32, 20), np.uint8), 4326, -70.25, -55.25, 0.000898)
    fails("lc100seg_s3", tmp_path, "0200599_val", "32 x 20 pixels do not fit the 10 x 10 of", "s3_olci", read=True)
    noise_dfc(tmp_path)
    (label,) = (tmp_path / "dfc").glob("*val*.tif")
    write_tif(label, np.full((1, 32, 32), 11, np.int32), 4326, 0, 0, 1)
    fails("dfc2020_s1", tmp_path, f"{label}: unknown label codes [11.0]; expected [0, 1, 2", read=True)


def test_hdf5_files(tmp_path):
    path = tmp_path / "lcz_s1s2/lcz_val.h5"
    expected = "expected lcz_s1s2/lcz_<split>.h5 with sen2 (N, 32, 32, 10) and label (N, 17)"
    fails("lcz_s2", tmp_path, "no split file lcz_val.h5", expected)
    noise_lcz(path.parent, count=4)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails("lcz_s2", tmp_path, f"{path} cannot be read as HDF5", expected)
    path.write_bytes(b"not HDF5")
    fails("lcz_s2", tmp_path, f"{path} cannot be read as HDF5", expected)

    def rewrite(**arrays: np.ndarray) -> None:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values

    images, labels = np.zeros((4, 32, 32, 10), np.float32), np.eye(17, dtype=np.uint8)[:4]
    rewrite(label=labels)
    fails("lcz_s2", tmp_path, f"{path} has no array 'sen2'", expected)
    rewrite(sen2=images)
    fails("lcz_s2", tmp_path, f"{path} has no array 'label'", expected)
    rewrite(sen2=images[..., :9], label=labels)
    fails("lcz_s2", tmp_path, "sen2 has shape (4, 32, 32, 9)", "10): the bands B02, B03, B04")
    rewrite(sen2=images, label=labels[:3])
    fails("lcz_s2", tmp_path, "label has shape (3, 17), expected (4, 17)")
    rewrite(sen2=images[:0], label=labels[:0])
    fails("lcz_s2", tmp_path, f"{path} holds no samples")
    rewrite(sen2=images, label=np.zeros((4, 17), np.uint8))
    fails("lcz_s2", tmp_path, "row 0: the label names no single class", read=True)


def test_hdf5_damaged_inside(tmp_path):
    """The file opens; the stored numbers of a row do not decompress."""
    path = tmp_path / "lcz_val.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.create_dataset("sen2", data=rng.random((2, 32, 32, 10)), chunks=(1, 32, 32, 10), compression="gzip")
        file["label"] = np.eye(17, dtype=np.uint8)[:2]
        offset = file["sen2"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\0" * 64)
    fails("lcz_s2", tmp_path, f"{path}: row 0 cannot be read", read=True)
    assert TASKS["lcz_s2"].open(tmp_path, "val")[1]["image"].isfinite().all()
