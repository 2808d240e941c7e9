"""The climate probe: ridge against scikit-learn, splits that keep their promises, grids half a cell off, real climatology."""

import csv
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_embed_map import pixel_at
from test_run import copernicus

from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import grid_name
from copernicus.platform.climate import (
    TEST,
    TRAIN,
    VAL,
    Cells,
    Moments,
    blocks_of,
    coordinates,
    fit_ridge,
    harmonics,
    probe,
    score,
    solve,
    split_cells,
    squared_errors,
)
from copernicus.platform.climate_stage import choose_cells, tables, write_scores
from copernicus.platform.climate_targets import open_targets
from copernicus.platform.grid_means import grid_tables
from copernicus.platform.schema import Climate


def regression(n=300, d=12, v=3, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * np.geomspace(0.01, 100, d) + rng.standard_normal(d) * 50
    y = x @ (rng.standard_normal((d, v)) / np.geomspace(0.01, 100, d)[:, None]) + noise * rng.standard_normal((n, v))
    return x, y + np.array([1000.0, 0.0, -5.0])[:v]


# ---------------------------------------------------------------- regression


def test_weights_are_those_of_scikit_learn():
    from sklearn.linear_model import Ridge

    x, y = regression()
    z = (x - x.mean(0)) / x.std(0)
    for strength in (1e-3, 1.0, 30.0):
        weights, intercept = solve(Moments.of(x, y), [strength])
        expected = Ridge(alpha=strength * len(x)).fit(z, y)
        np.testing.assert_allclose(x @ weights[0] + intercept[0], expected.predict(z), rtol=1e-6)


def test_errors_of_moments_are_those_of_the_cells():
    x, y = regression()
    weights, intercept = solve(Moments.of(x[:200], y[:200]), [0.01, 1.0])
    held = Moments.of(x[200:], y[200:])
    expected = [((x[200:] @ w + b - y[200:]) ** 2).sum(0) for w, b in zip(weights, intercept, strict=True)]
    np.testing.assert_allclose(squared_errors(held, weights, intercept), expected, rtol=1e-5)


def test_the_strength_is_the_one_that_cross_validation_finds():
    """Fold by fold with scikit-learn's own ridge, standardised in each."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = regression(n=60, d=30, noise=8.0)
    folds = np.arange(60) % 4
    strengths = [10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-5]
    weights, intercept, chosen = fit_ridge(x, y, folds, strengths)
    for v in range(3):
        errors = []
        for s in strengths:
            error = 0.0
            for fold in range(4):
                inside = folds != fold
                model = make_pipeline(StandardScaler(), Ridge(alpha=s * inside.sum())).fit(x[inside], y[inside, v])
                error += ((model.predict(x[~inside]) - y[~inside, v]) ** 2).sum()
            errors.append(error)
        assert chosen[v] == strengths[int(np.argmin(errors))]
        model = make_pipeline(StandardScaler(), Ridge(alpha=chosen[v] * 60)).fit(x, y[:, v])
        np.testing.assert_allclose(x @ weights[:, v] + intercept[v], model.predict(x), rtol=1e-5)


def test_inputs_that_are_constant_have_no_say():
    x, y = regression(n=80, d=3)
    x[:, 1] = 7.0
    weights, _, _ = fit_ridge(x, y, np.arange(80) % 5)
    assert (weights[1] == 0).all()
    assert np.isfinite(weights).all()


def test_scores_and_their_intervals():
    rng = np.random.default_rng(3)
    y = rng.standard_normal((400, 1)) + 300
    said = y + 0.5 * rng.standard_normal((400, 1))
    ((rmse, r2),) = score(y, said, np.arange(400), 0, "random", "test")
    assert rmse.value == pytest.approx(math.sqrt(np.mean((y - said) ** 2)))
    assert r2.value == pytest.approx(1 - np.sum((y - said) ** 2) / np.sum((y - y.mean()) ** 2))
    # The deviation of a root mean square error of normal errors is sigma / sqrt(2 n).
    assert rmse.high - rmse.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(800), rel=0.15)
    blocked = np.repeat(np.arange(16), 25)
    clustered = y + np.repeat(rng.standard_normal(16), 25)[:, None]
    ((by_cell, _),) = score(y, clustered, np.arange(400), 0, "x")
    ((by_block, _),) = score(y, clustered, blocked, 0, "x")
    assert by_block.high - by_block.low > 2 * (by_cell.high - by_cell.low)  # 400 cells tell no more than 16 blocks


# ---------------------------------------------------------------- splits and inputs


def test_no_block_has_cells_in_two_parts():
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-180, 180, 3000), rng.uniform(-60, 75, 3000)
    blocks = blocks_of(lon, lat, 10.0)
    parts = split_cells(blocks, 0, (0.6, 0.2, 0.2), "blocks parts")
    assert all(len(set(parts[blocks == block])) == 1 for block in set(blocks))
    np.testing.assert_allclose(np.bincount(parts) / 3000, (0.6, 0.2, 0.2), atol=0.02)
    assert (split_cells(blocks, 1, (0.6, 0.2, 0.2), "blocks parts") != parts).any()
    assert blocks_of(np.array([-180.0]), np.array([3.0]), 10.0) == blocks_of(np.array([180.0]), np.array([3.0]), 10.0)


def test_harmonics_are_orthogonal_on_the_sphere():
    nodes, weights = np.polynomial.legendre.leggauss(40)
    lam = np.arange(80) * 4.5 - 180
    lon, height = np.meshgrid(lam, nodes)
    z = harmonics(lon.ravel(), np.degrees(np.arcsin(height.ravel())), 6)
    assert z.shape[1] == 48
    gram = z.T @ (z * np.repeat(weights, 80)[:, None])
    off = gram - np.diag(np.diag(gram))
    assert np.abs(off).max() < 1e-9
    assert np.diag(gram).min() > 0.1


def test_a_probe_finds_what_is_there_and_blocks_tell_memory_from_knowledge():
    """Embeddings that hold the climate do as well in new blocks; ones that only know the place do not."""
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(60, 560, 3000), rng.integers(0, 1440, 3000)
    field = np.sin(columns / 25) * np.cos(rows / 20)
    cells = Cells(rows, columns, np.stack([field, 3 * field + 1], -1).astype(np.float32))
    knows = field[:, None] + 0.1 * rng.standard_normal((3000, 8))
    centres = rng.uniform((60, 0), (560, 1440), (300, 2))
    place = np.exp(-(((rows[:, None] - centres[:, 0]) ** 2 + (columns[:, None] - centres[:, 1]) ** 2) / 2 / 25**2))
    inputs = {"knows": knows, "place": place, "coordinates": coordinates(cells.lon, cells.lat)}
    r2 = {}
    for split in ("random", "blocks"):
        for found in probe(cells, inputs, ["one", "other"], split, 0, 15.0):
            assert {found.parts_N.tolist().count(part) > 300 for part in (TRAIN, VAL, TEST)} == {True}
            for s in found.scores:
                assert s.r2.low <= s.r2.value <= s.r2.high
            r2[split, found.inputs] = [s.r2.value for s in found.scores if s.part == "test"]
    assert min(r2["random", "knows"] + r2["blocks", "knows"]) > 0.95
    assert min(r2["random", "place"]) > max(r2["blocks", "place"]) + 0.1
    assert max(r2["random", "coordinates"]) < 0.2
    np.testing.assert_allclose(*r2["random", "knows"], atol=1e-6)  # in whatever units


# ---------------------------------------------------------------- targets


def square(offset: float, value=lambda lon, lat: lon + 10 * lat):
    lon, lat = np.meshgrid(np.arange(-2, 2.01, 0.25) + offset, np.arange(40, 43.01, 0.25) + offset)
    return lon.ravel(), lat.ravel(), value(lon, lat).ravel()


def write(path, lon, lat, **columns):
    pq.write_table(pa.table({"longitude": lon, "latitude": lat, **columns}), path)
    return path


def test_targets_lie_where_they_should(tmp_path):
    lon, lat, value = square(0.0)
    found = open_targets(write(tmp_path / "t.parquet", lon % 360, lat, v=value, n=np.arange(len(lon))))
    assert found.names == ("v", "n")
    assert not found.half_cell
    assert np.isfinite(found.values[..., 0]).sum() == len(lon)
    assert found.values[(*pixel_at(-1.25, 41.5), 0)] == -1.25 + 415
    names = [grid_name(round((b + 90) / 0.25) * 1440 + round((a + 180) / 0.25)) for a, b in zip(lon, lat, strict=True)]
    pq.write_table(pa.table({"grid_id_coord": names, "v": value}), tmp_path / "g.parquet")
    np.testing.assert_array_equal(open_targets(tmp_path / "g.parquet").values[..., 0], found.values[..., 0])


def test_cells_half_a_cell_off_are_averaged_to_the_nodes(tmp_path):
    lon, lat, value = square(0.125)
    value[np.argmin(np.hypot(lon - 0.125, lat - 41.125))] = np.nan
    found = open_targets(write(tmp_path / "t.parquet", lon, lat, v=value))
    assert found.half_cell
    assert found.values[(*pixel_at(1.0, 42.0), 0)] == pytest.approx(1 + 420)  # a plane comes out as it is
    assert found.values[(*pixel_at(0.0, 41.0), 0)] == pytest.approx(410 + np.mean([-0.125 - 1.25, -0.125 + 1.25, 0.125 - 1.25]))  # fmt: skip
    edge = found.values[(*pixel_at(-2.0, 40.0), 0)]
    assert edge == pytest.approx(-1.875 + 401.25)  # of the only one there is


def test_netcdf_with_and_without_time(tmp_path):
    import xarray

    lat, lon = np.arange(43, 39.9, -0.25), np.arange(0, 4.1, 0.25)
    rng = np.random.default_rng(0)
    t = rng.standard_normal((12, len(lat), len(lon)))
    data = xarray.Dataset(
        {"t2m": (("valid_time", "latitude", "longitude"), t), "z": (("latitude", "longitude"), t[0])},
        coords={"latitude": lat, "longitude": lon, "valid_time": np.arange(12)},
    )
    data.to_netcdf(tmp_path / "four.nc", engine="h5netcdf")
    data.to_netcdf(tmp_path / "three.nc", engine="scipy")
    for name in ("four.nc", "three.nc"):
        found = open_targets(tmp_path / name)
        assert found.names == ("t2m_mean", "t2m_std", "z")
        at = pixel_at(lon[5], lat[2])
        np.testing.assert_allclose(found.values[at], [t[:, 2, 5].mean(), t[:, 2, 5].std(), t[0, 2, 5]], rtol=1e-5)
    assert open_targets(tmp_path / "four.nc", ["t2m_std"]).names == ("t2m_std",)
    assert open_targets(tmp_path / "four.nc", ["t2m"]).names == ("t2m_mean", "t2m_std")
    with pytest.raises(InputError, match=r"climate.variables: .* has none of snow; it has t2m, z"):
        open_targets(tmp_path / "four.nc", ["snow"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: write(p, *square(0.06)[:2], v=square(0)[2]), r"not on a grid of 0.25 degrees"),
        (lambda p: write(p, [0.0, 0.0], [1.0, 1.0], v=[1.0, 2.0]), r"several values for the cell near longitude 0, latitude 1"),
        (lambda p: write(p, [0.0], [95.0], v=[1.0]), r"not on the globe"),
        (lambda p: write(p, [0.0], [5.0], v=["a"]), r"no numeric variable"),
        (lambda p: pq.write_table(pa.table({"v": [1.0]}), p), r"needs the columns longitude and latitude, or grid_id_coord; it has v"),
        (lambda p: pq.write_table(pa.table({"grid_id_coord": ["9999999_0_0"], "v": [1.0]}), p), r"no grid 9999999"),
        (lambda p: p.write_bytes(b"PAR1 nothing"), r"cannot be read"),
        (lambda p: write(p, ["a"], ["b"], v=[1.0]), r"cannot be read"),
        (lambda p: pq.write_table(pa.table({"grid_id_coord": pa.array([], pa.string()), "v": pa.array([], pa.float64())}), p), r"has no rows"),
    ],
)  # fmt: skip
def test_wrong_targets(make, said, tmp_path):
    path = tmp_path / "t.parquet"
    make(path)
    with pytest.raises(InputError, match=said):
        open_targets(path)


@pytest.mark.parametrize("content", [b"CDF\x01 nothing", b"\x89HDF nothing", b"text"])
def test_a_netcdf_that_is_none(content, tmp_path):
    (tmp_path / "t.nc").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        open_targets(tmp_path / "t.nc")


def test_a_netcdf_with_both_ends_months_and_a_truncated_one(tmp_path):
    import xarray

    lat, lon = np.arange(42, 39.9, -0.25), np.arange(0, 360.1, 0.25)
    t = np.random.default_rng(0).standard_normal((12, len(lat), len(lon)))
    t[..., -1] = t[..., 0]
    data = xarray.Dataset(
        {"t2m": (("time", "lat", "lon"), t)},
        coords={"lat": lat, "lon": lon, "time": ("time", np.arange(12), {"units": "months since 1990-01-01"})},
    )
    data.to_netcdf(tmp_path / "t.nc", engine="scipy")
    found = open_targets(tmp_path / "t.nc")
    np.testing.assert_allclose(found.values[(*pixel_at(0.0, 42.0), 0)], t[:, 0, 0].mean(), rtol=1e-5)
    whole = (tmp_path / "t.nc").read_bytes()
    for size in (40, 200, len(whole) // 2):
        (tmp_path / "cut.nc").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"climate\.targets"):
            open_targets(tmp_path / "cut.nc")


def test_a_target_that_is_the_same_everywhere_tells_nothing(tmp_path):
    lon, lat, value = square(0.0)
    targets = open_targets(write(tmp_path / "t.parquet", lon, lat, v=value, land=np.ones(len(lon))))
    with pytest.raises(InputError, match=r"land is 1 in every cell, and tells nothing"):
        choose_cells(targets, None, None, 0)


def test_a_region_of_few_blocks_is_not_split_by_them():
    rows, columns = (axis.ravel() for axis in np.mgrid[200:230, 700:730])
    cells = Cells(rows, columns, (rows + columns)[:, None].astype(np.float32))
    inputs = {"coordinates": coordinates(cells.lon, cells.lat)}
    with pytest.raises(InputError, match=r"blocks of 10 degrees are too few to split by; lower climate.block_degrees"):
        probe(cells, inputs, ["v"], "blocks", 0, 10.0)
    (found,) = probe(cells, inputs, ["v"], "blocks", 0, 2.0)
    (test,) = [s for s in found.scores if s.part == "test"]
    assert test.r2.value > 0.99
    assert math.isnan(test.r2.low)  # of so few blocks no interval is drawn
    assert 2 <= test.units < 10


def test_variables_that_are_not_there(tmp_path):
    path = write(tmp_path / "t.parquet", *square(0)[:2], rain=square(0)[2])
    with pytest.raises(InputError, match=r"climate.variables: .* has no 'snow'; it has rain"):
        open_targets(path, ["snow"])


# ---------------------------------------------------------------- joined to embeddings


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table({"grid_id_coord": ["0000001_0_0"]}), "no column embedding; it has grid_id_coord"),
        (pa.table({"grid_id_coord": ["north"], "embedding": [[1.0]]}), r"grid_id_coord 'north' is no grid"),
        (pa.table({"grid_id_coord": ["1038240_0_0"], "embedding": [[1.0]]}), r"'1038240_0_0' is no grid"),
        (pa.table({"grid_id_coord": ["0000001_0_0", "0000002_0_0"], "embedding": [[1.0], [1.0, 2.0]]}), r"different widths: \[1, 2\]"),
        (pa.table({"grid_id_coord": ["0000001_0_0", "0000001_0_0"], "embedding": [[1.0], [2.0]]}), r"grid 0000001_-179.75_-90.00 is there twice"),
        (pa.table({"grid_id_coord": ["0000001_0_0"], "embedding": [[float("nan")]]}), r"the embedding of grid 0000001_-179.75_-90.00 is not finite"),
        (pa.table({"grid_id_coord": ["0000001_0_0", "0000002_0_0"], "embedding": [[1.0], None]}), r"1 embeddings are null"),
        (pa.table({"grid_id_coord": ["0000001_0_0"], "embedding": [1.0]}), r"embedding holds double; it must be lists"),
        (pa.table({"grid_id_coord": ["0000001_0_0"], "embedding": [["a"]]}), r"must be lists of floating-point numbers"),
        (pa.table({"grid_id_coord": ["²_0"], "embedding": [[1.0]]}), r"is no grid"),
    ],
)  # fmt: skip
def test_wrong_embeddings(table, said, tmp_path):
    pq.write_table(table, tmp_path / "grids.parquet")
    with pytest.raises(InputError, match=said):
        list(grid_tables(tmp_path / "grids.parquet"))


def test_cells_are_those_that_have_both(tmp_path):
    lon, lat, value = square(0.0)
    value[3] = np.nan
    targets = open_targets(write(tmp_path / "t.parquet", lon, lat, v=value))
    numbers = [round((b + 90) / 0.25) * 1440 + round((a + 180) / 0.25) for a, b in zip(lon, lat, strict=True)][:120]
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(numbers)
    z = rng.standard_normal((120, 4)).astype(np.float32)
    pq.write_table(
        pa.table({"grid_id_coord": [grid_name(int(n)) for n in shuffled], "embedding": list(z)}),
        tmp_path / "grids.parquet", row_group_size=50,
    )  # fmt: skip
    cells, vectors, said = choose_cells(targets, tmp_path / "grids.parquet", None, 0)
    assert len(cells.rows) == 119
    assert said == ""  # a cell without any target lacks nothing that is worth a word
    for row, column, x, y in zip(cells.rows, cells.columns, vectors, cells.targets_NV, strict=True):
        grid = (720 - row) * 1440 + column
        np.testing.assert_array_equal(x, z[list(shuffled).index(grid)])
        a, b = column * 0.25 - 180, 90 - row * 0.25
        assert y[0] == a + 10 * b
    some, _, _ = choose_cells(targets, tmp_path / "grids.parquet", 60, 0)
    again, _, _ = choose_cells(targets, tmp_path / "grids.parquet", 60, 0)
    assert len(some.rows) == 60
    np.testing.assert_array_equal(some.rows, again.rows)
    with pytest.raises(InputError, match=r"8 cells are too few to probe: 8 have all of v; give more"):
        choose_cells(open_targets(write(tmp_path / "few.parquet", lon[:9], lat[:9], v=value[:9])), None, None, 0)


def test_the_real_climatology_from_places_alone(real_data, tmp_path):
    """Annual mean temperature follows latitude; rain much less. Spatial blocks are never easier than a random split."""
    source = np.load(real_data / "climate" / "climate_targets_land_cells.npz")
    scale = dict(zip(source["scale_names"], source["scale_values"], strict=True))
    columns = {name: source[name] * float(scale.get(name, 1)) for name in ("bio1", "bio12")}
    lat, lon = 89.875 - 0.25 * source["row"].astype(float), -179.875 + 0.25 * source["col"].astype(float)
    targets = open_targets(write(tmp_path / "t.parquet", lon, lat, **columns))
    assert targets.half_cell
    cells, _, _ = choose_cells(targets, None, 20_000, 0)
    inputs = {"coordinates": coordinates(cells.lon, cells.lat), "harmonics": harmonics(cells.lon, cells.lat)}
    scores = [
        s for split in ("random", "blocks") for found in probe(cells, inputs, targets.names, split, 0, 10.0) for s in found.scores
    ]  # fmt: skip
    r2: dict = {}
    for s in scores:  # both parts: single cells with ten times the usual rain move one
        r2[s.split, s.inputs, s.variable] = r2.get((s.split, s.inputs, s.variable), 0.0) + s.r2.value / 2
    assert r2["random", "coordinates", "bio1"] > 0.7
    assert r2["random", "harmonics", "bio1"] > r2["random", "coordinates", "bio1"]
    assert r2["random", "harmonics", "bio12"] > r2["blocks", "harmonics", "bio12"]
    write_scores(scores, tmp_path / "climate.csv")
    with open(tmp_path / "climate.csv") as file:
        assert len(list(csv.DictReader(file))) == len(scores) == 2 * 2 * 2 * 2
    assert len(list(tables(scores, Climate(inputs=list(inputs))))) == 2


def test_wrong_targets_leave_nothing_behind(tmp_path):
    lon, lat, value = square(0.0)
    write(tmp_path / "t.parquet", lon, lat, v=value)
    (tmp_path / "c.yaml").write_text("name: c\nkind: climate\nclimate: {targets: t.parquet, inputs: [coordinates]}\n")
    output = copernicus(tmp_path, "run", "c.yaml", "climate.variables=[rain]", code=2)
    assert "climate.variables: t.parquet has no 'rain'; it has v" in output
    assert len(output.strip().splitlines()) <= 3
    output = copernicus(tmp_path, "run", "c.yaml", "climate.cells=10", code=2)
    assert "climate.cells: must be at least 50, it is 10" in output
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["c.yaml", "t.parquet"]
