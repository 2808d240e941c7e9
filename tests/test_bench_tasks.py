"""Names, modes and groups of tasks; split files of every kind; series."""

import datetime

import numpy as np
import pytest
import torch
from bench_files import DATES, SEASONS, noise_air, noise_bigearthnet, noise_lc100, noise_lcz

from copernicus.datasets import TASKS, InputError, get_task
from copernicus.datasets.bench import select_tasks, splits
from copernicus.datasets.bench.tasks import VARIANTS

L1 = ["cloud_s2", "cloud_s3"]
L2 = ["eurosat_s1", "eurosat_s2", "bigearthnet_s1", "bigearthnet_s2", "lc100cls_s3", "dfc2020_s1", "dfc2020_s2"]
L3 = ["flood_s1", "lcz_s2", "biomass_s3", "aq_no2_s5p", "aq_o3_s5p"]
ALL = [*L1, *L2, "lc100seg_s3", *L3]


def test_there_are_fifteen_tasks_and_six_other_modes():
    assert list(TASKS) == ALL
    assert {name for task in TASKS.values() for name in task.modes[1:]} == {"binary", "series", "seasonal"}
    assert {f"{task.name}-{mode}" for task in TASKS.values() for mode in task.modes[1:]} == set(VARIANTS)
    assert {task.name for task in VARIANTS.values() if task.series} == set(VARIANTS) - {"cloud_s3-binary"}
    assert get_task("cloud_s3-binary").num_classes == 2
    assert not any(get_task("cloud_s3-binary").published.values())  # the published figures are of five classes


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (["all"], ALL),
        (["L1"], L1),
        (["L3", "flood_s1"], L3),
        (["s1"], ["eurosat_s1", "bigearthnet_s1", "dfc2020_s1", "flood_s1"]),
        (["s5p"], ["aq_no2_s5p", "aq_o3_s5p"]),
        (["flood_s1", "L1", "cloud_s3"], ["cloud_s2", "cloud_s3", "flood_s1"]),
        (["biomass_s3-series", "s3"], ["cloud_s3", "lc100cls_s3", "lc100seg_s3", "biomass_s3", "biomass_s3-series"]),
        ([], []),
    ],
)
def test_tasks_are_selected_in_one_order(items, names):
    assert select_tasks(items) == names


def test_what_is_no_task_is_answered_with_the_choices():
    with pytest.raises(InputError, match=r"'s4'; valid choices: cloud_s2, .*all, L1, L2, L3, s1, s2, s3, s5p.*-series"):
        select_tasks(["s2", "s4"])
    for name in ("eurosat_s3", "cloud_s3-series", "cloud_s3-multi", "flood_s1-binary"):
        with pytest.raises(InputError, match=rf"no task '{name}'; the tasks are cloud_s2, .*cloud_s3-binary"):
            get_task(name)


@pytest.mark.parametrize("header", ["header", "numbers", ""])
def test_label_lists_are_read_by_position(tmp_path, header):
    noise_bigearthnet(tmp_path / "bigearthnet_s1s2", header)
    noise_lc100(tmp_path / "lc100_s3", header)
    for name, columns in (("bigearthnet_s1", 2), ("bigearthnet_s2", 2), ("lc100cls_s3", 1), ("lc100cls_s3-series", 1)):
        task = get_task(name)
        lines = (tmp_path / task.directory / "multilabel-test.csv").read_text().splitlines()[-2:]
        dataset = task.open(tmp_path, "test")
        assert len(dataset) == 2
        for sample, line in zip(dataset, lines, strict=True):
            cells = line.split(",")
            assert sample["target"].tolist() == [int(cell) for cell in cells[columns:]]
            assert sample["target"].dtype == torch.int64
            assert sample["id"] in cells["s2" in name]


def test_a_first_line_of_labels_is_no_header():
    entries = splits.list_lc100("a," + ",".join("0" * 23) + "\nb," + ",".join("1" * 23) + "\n")
    assert [(entry.id, sum(entry.labels)) for entry in entries] == [("a", 0), ("b", 23)]


def test_names_come_with_and_without_their_suffix():
    for line in ("ROI_1__20200422", "ROI_1__20200422.tif", "  ROI_1__20200422.jpg\r"):
        assert splits.list_names(line + "\n\n") == [splits.Entry("ROI_1__20200422", {"name": "ROI_1__20200422"})]
    (entry,) = splits.list_dfc("ROIs0000_test_dfc_0_p609.tif\n")
    assert (entry.fields["s1"], entry.fields["dfc"]) == ("ROIs0000_test_s1_0_p609", "ROIs0000_test_dfc_0_p609")
    (entry,) = splits.list_images("0200599_-70.25_-55.25,S3A_20190507T135736_20190507T135744.tif")
    assert entry.fields == {"pid": "0200599_-70.25_-55.25", "file": "S3A_20190507T135736_20190507T135744"}


def days(text: str) -> float:
    return (datetime.date.fromisoformat(text) - datetime.date(1970, 1, 1)).days


def test_series_have_as_many_dates_as_there_are(tmp_path):
    noise_lc100(tmp_path, count=3)
    series, static = (get_task(f"lc100seg_s3{mode}").open(tmp_path, "train") for mode in ("-series", ""))
    expected = [days(f"{date[:4]}-{date[4:6]}-{date[6:8]}") for date in DATES]
    for index in range(3):
        assert series[index]["image"].shape == (1 + index, 21, 288, 288)
        assert series[index]["metadata"][:, 2].tolist() == expected[: 1 + index]
        # the list of static images names the last date of each place here
        assert torch.equal(series[index]["image"][-1], static[index]["image"])
        assert torch.equal(series[index]["metadata"][-1, [0, 1, 3]], static[index]["metadata"][[0, 1, 3]])


def test_seasons_come_in_order(tmp_path):
    noise_air(tmp_path, "no2")
    sample = get_task("aq_no2_s5p-seasonal").open(tmp_path, "val")[0]
    assert sample["image"].shape == (4, 1, 56, 56)
    assert sample["metadata"][:, 2].tolist() == [days(season[:10]) for season in SEASONS]


def test_two_satellites_of_one_day_are_two_dates(tmp_path):
    noise_lc100(tmp_path, count=1)
    (first,) = (tmp_path / "s3_olci").glob("*val*/*.tif")
    first.with_name(first.name.replace("S3A_20190507", "S3B_20190506")).write_bytes(first.read_bytes())
    first.with_name(first.name.replace("S3A", "S3B")).write_bytes(first.read_bytes())
    sample = get_task("lc100cls_s3-series").open(tmp_path, "val")[0]
    assert sample["metadata"][:, 2].tolist() == [days("2019-05-06"), days("2019-05-07"), days("2019-05-07")]


def test_default_token_areas_follow_the_ground(tmp_path):
    noise_lcz(tmp_path)
    sample = TASKS["lcz_s2"].open(tmp_path, "val")[0]
    assert float(sample["metadata"][3]) == pytest.approx((0.16 * 32 / 112) ** 2)
    assert np.isnan(sample["metadata"][:3]).all()
    noise_lc100(tmp_path, size=12, label_size=36)
    areas = [float(TASKS["lc100seg_s3"].open(tmp_path, "val", image_size=s)[0]["metadata"][3]) for s in (96, 288)]
    assert areas == pytest.approx([(2.4 * 12 / 96) ** 2, (2.4 * 12 / 288) ** 2])
