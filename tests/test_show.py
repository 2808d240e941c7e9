"""`copernicus data show`: the right grid, everything it holds, and a page on which nothing lies over anything else."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from shard_faults import change_array, change_names, sound_grid, sound_shards, write_tar
from test_run import copernicus
from test_slices import members

from copernicus.datasets.index import index_shards, to_table, write_index
from copernicus.datasets.lookup import find_grid, parse_grid
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import Grid, grid_center, write_shards
from copernicus.datasets.survey import survey_shard
from copernicus.platform.composites import NO_VALUE, to_block
from copernicus.platform.show import grid_figure

ABSENT = ("s2_toa", "s5p_no2", "dem")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    """Two shards of three grids; the second grid of all lacks three sensors."""
    grids = (sound_grid(i, ABSENT if i == 1 else ()) for i in range(6))
    return [str(p) for p in write_shards(grids, tmp_path_factory.mktemp("show"), 3)]


def quiet(done: float, total: float, note: str) -> None:
    """No progress bar."""


def test_a_grid_is_named_by_its_digits_or_by_a_place():
    assert parse_grid("0200599") == "0200599"
    assert parse_grid("-70.25,-55.25") == parse_grid(" -70.3 , -55.2 ") == "0200599"
    assert grid_center(int(parse_grid("359.75,10"))) == (-0.25, 10)
    for wrong in ("200599", "02005990", "-70.25", "1,2,3", "grid", "10,91", "-200,10", "9999999", "nan,1"):
        with pytest.raises(InputError):
            parse_grid(wrong)


@pytest.mark.parametrize("indexed", [False, True])
def test_the_shard_that_holds_it_is_found(shards, tmp_path, indexed):
    index = Path(shards[0]).with_name("index.parquet")
    if indexed:
        write_index(to_table(survey_shard(uri) for uri in shards), str(index))
    try:
        for number in range(6):
            uri, grid = find_grid(sound_grid(number).key, shards, quiet)
            assert (uri, grid.key) == (shards[number // 3], sound_grid(number).key)
    finally:
        index.unlink(missing_ok=True)


def test_a_stale_index_does_not_hide_a_grid(tmp_path):
    paths = [str(p) for p in sound_shards(tmp_path, 2, 1)]
    write_index(to_table(survey_shard(uri) for uri in paths), str(tmp_path / "index.parquet"))
    first, second = (Path(p).read_bytes() for p in paths)
    Path(paths[0]).write_bytes(second)
    Path(paths[1]).write_bytes(first)
    assert find_grid(sound_grid(0).key, paths, quiet)[0] == paths[1]
    (tmp_path / "index.parquet").write_bytes(b"nothing")
    assert find_grid(sound_grid(1).key, paths, quiet)[0] == paths[0]


def test_one_that_is_not_there_is_told_its_neighbours(shards):
    lon, lat = grid_center(int(sound_grid(2).key))
    wanted = parse_grid(f"{lon},{lat + 0.25}")
    with pytest.raises(InputError) as caught:
        find_grid(wanted, shards, quiet)
    message = str(caught.value)
    assert f"grid {wanted} is in none of the 2 shards, which hold 6 grids; the nearest" in message
    assert f"{sound_grid(2).key} (0.25)" in message
    assert message.index(sound_grid(2).key) < message.index(sound_grid(3).key) < message.index(sound_grid(0).key)


def drawn(shards: list[str], number: int) -> Figure:
    uri, grid = find_grid(sound_grid(number).key, shards, quiet)
    figure, problems = grid_figure(uri, grid)
    assert problems == []
    return figure


def said(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.texts] + [t.get_text() for axes in figure.axes for t in axes.texts]


def assert_nothing_overlaps(figure: Figure) -> None:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    page = figure.bbox.padded(0.5)
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]  # with the numbers of colour bars
    texts = {t.get_text(): t.get_window_extent(renderer) for t in figure.texts if t.get_text()}
    numbered = [*enumerate(boxes), *((t, t.get_window_extent(renderer)) for t in figure.texts if t.get_text())]
    for (first, a), (second, b) in itertools.combinations(numbered, 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (first, second)
    for name, box in [*enumerate(boxes), *texts.items()]:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, name
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, name
    # No more than two thirds of the page is white.
    area = sum(box.width * box.height for box in [*boxes, *texts.values()])
    assert area > page.width * page.height / 3


def test_every_image_is_drawn_under_its_date(shards):
    figure = drawn(shards, 0)
    images = [axes for axes in figure.axes if axes.images]
    assert len(images) == 2 * (2 * 3) + 3 + 4 * 3 + 1
    words = said(figure)
    for date in ("2020-01-15", "2020-06-15", "2020-10-15"):
        assert words.count(date) == 2 * 2 + 1 + 4
    lon, lat = grid_center(int(sound_grid(0).key))
    for patch in range(2):
        assert words.count(f"patch {patch}\n{lon:.4f}, {lat:.4f}") == 2
    assert f"grid {sound_grid(0).key}" in words
    assert any("40 N, 10 W" in w and "example-000000.tar" in w and "all eight sensors" in w for w in words)
    assert "missing" not in words
    assert_nothing_overlaps(figure)


def test_a_sensor_that_is_not_there_is_an_empty_frame(shards):
    figure = drawn(shards, 1)
    words = said(figure)
    assert words.count("missing") == 3
    assert any("lacks s2_toa, s5p_no2, dem" in w for w in words)
    assert len([axes for axes in figure.axes if axes.images]) == 2 * 3 + 3 + 3 * 3
    assert_nothing_overlaps(figure)


@pytest.mark.parametrize(
    ("patches", "dates", "colour", "gases", "absent"),
    [
        (4, 4, 8, 12, ()), (1, 4, 8, 12, ()), (2, 4, 8, 12, ()), (1, 1, 1, 1, ()), (7, 2, 3, 5, ()), (1, 2, 2, 4, ()),
        (4, 4, 8, 12, ("s1_grd", "s2_toa")), (4, 4, 8, 12, ("s3_olci", "dem")),
        (1, 4, 8, 12, ("s5p_co", "s5p_no2", "s5p_o3", "s5p_so2")), (2, 4, 8, 12, tuple(list(SENSORS)[1:])),
        (2, 4, 8, 12, tuple(list(SENSORS)[:-1])), (1, 1, 1, 1, tuple(list(SENSORS)[:-1])), (9, 1, 1, 1, ("s2_toa", "s5p_co")),
    ],
)  # fmt: skip
def test_the_page_suits_any_number_of_places_and_dates(tmp_path, patches, dates, colour, gases, absent):
    whole = sound_grid(0)
    name = whole.images["dem"][0][0]
    counts = {s: (patches, dates) if s in ("s1_grd", "s2_toa") else (colour,) if s == "s3_olci" else (gases,) for s in SENSORS}  # fmt: skip
    arrays, images = {}, {}
    for sensor, array in whole.arrays.items():
        if sensor in absent:
            continue
        if sensor == "dem":
            arrays[sensor], images[sensor] = array, [[name]]
            continue
        leading = counts[sensor]
        one = array.reshape(-1, *array.shape[-3:])[0]
        arrays[sensor] = np.broadcast_to(one, (*leading, *one.shape))
        days = [f"2020{1 + d % 12:02d}15" for d in range(leading[-1])]
        images[sensor] = [f"{name}/{d}" for d in days] if len(leading) == 1 else [
            [f"{name}/{p}_-10.0{p}_40.0{p}/{d}" for d in days] for p in range(patches)
        ]  # fmt: skip
    (path,) = write_shards([Grid(whole.key, arrays, images)], tmp_path)
    figure = drawn([str(path)], 0)
    assert len([axes for axes in figure.axes if axes.images]) == sum(
        int(np.prod(counts[s])) if s != "dem" else 1 for s in arrays
    )
    assert_nothing_overlaps(figure)


def test_images_without_values_repeated_dates_and_faults_are_said(tmp_path, shards):
    contents = {n: d for n, d in members(Path(shards[0])).items() if n.startswith(sound_grid(0).key)}
    key = sound_grid(0).key
    change_array(contents, f"{key}.s5p_co.pth", lambda x: np.concatenate([x[:2], x[2:] * np.nan]))
    change_array(contents, f"{key}.dem.pth", lambda x: x * np.nan)
    change_names(contents, key, "s5p_o3", lambda names: [names[0]] * 3)
    data = contents[f"{key}.s2_toa.pth"]
    contents[f"{key}.s2_toa.pth"] = data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
    contents[f"{key}.s1_grd.pth"] = b"nothing"
    path = write_tar(tmp_path / "a.tar", contents)
    (grid,) = survey_shard(str(path)).grids
    figure, problems = grid_figure(str(path), grid)
    words = said(figure)
    assert words.count("no value") == 2
    assert words.count("cannot be read") == 1
    assert words.count("missing") == 1
    assert len(problems) == 2
    assert "s1_grd.pth: unsafe_or_broken_pth" in problems[0]
    assert "checksum" in problems[1]
    assert any(w.startswith(problems[0][:60]) and w.endswith("and 1 more") for w in words)
    grey = [t for t in figure.texts if t.get_style() == "italic" and t.get_text() == "2020-01-15"]
    assert len(grey) == 2
    assert_nothing_overlaps(figure)


def test_colours_are_the_bands_brightness_and_one_stretch_for_all_dates(shards):
    entry = index_shards(shards)[0]
    grid = sound_grid(0)
    optical = grid.arrays["s2_toa"].copy()
    optical[0, 0, :, :5] = 0  # no data
    block = to_block(optical, SENSORS["s2_toa"], entry.sensors["s2_toa"])
    assert (block.rows, block.columns) == (2, 3)
    images = [image for image in block.images if image is not None]
    assert len(images) == 6
    assert (images[0][:5] == NO_VALUE).all()
    bands = [SENSORS["s2_toa"].bands.index(b) for b in ("B04", "B03", "B02")]
    flat = optical.reshape(6, 13, 40, 40)
    for c, band in enumerate(bands):
        values = np.concatenate([flat[i, band, 5:].ravel() for i in range(6)])
        colours = np.concatenate([images[i][5:, :, c].ravel() for i in range(6)])
        order = np.argsort(values, kind="stable")
        assert (np.diff(colours[order]) >= 0).all(), "brighter ground, brighter colour, whatever the date"
        assert colours.min() == 0
        assert colours.max() == 1


def test_the_command(tmp_path, shards):
    folder = str(Path(shards[0]).parent)
    lon, lat = grid_center(int(sound_grid(1).key))
    output = copernicus(tmp_path, "data", "show", f"{lon},{lat}", folder)
    key = sound_grid(1).key
    assert f"Grid {key} of {shards[0]}: look at {key}.png" in output
    data = (tmp_path / f"{key}.png").read_bytes()
    assert data[:4] == b"\x89PNG"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert 800 < height < width < 3000


def test_wrong_input_gives_code_2_and_leaves_nothing(tmp_path, shards):
    folder = str(Path(shards[0]).parent)
    assert "the nearest" in copernicus(tmp_path, "data", "show", "0000000", folder, code=2)
    assert "seven digits" in copernicus(tmp_path, "data", "show", "here", folder, code=2)
    assert "does not exist" in copernicus(tmp_path, "data", "show", "0000000", "nowhere.tar", code=2)
    key = sound_grid(0).key
    assert "--out" in copernicus(tmp_path, "data", "show", key, folder, "--out", "none/x.png", code=2)
    assert list(tmp_path.iterdir()) == []
