"""The leaderboard: statistics against numpy, scipy and printed t tables; who leads, and how it is shown."""

import io
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from copernicus.datasets.bench import TASKS
from copernicus.platform.leaderboard import Leaderboard, Score, summarise


def board(**tests: dict[str, list[float]]) -> Leaderboard:
    """board(task={encoder: [test of each seed]})"""
    return Leaderboard(
        tuple(
            Score(task, encoder, seed, value, value - 1.0)
            for task, cells in tests.items()
            for encoder, values in cells.items()
            for seed, value in enumerate(values)
        )
    )


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [90.1, 91.4, 90.7], [5.0, 5.0, 5.0], list(range(10)), [1e9, 1e9 + 1, 1e9 + 2]]
)
def test_summaries_equal_independent_ones(values):
    s = summarise(values)
    assert s.n == len(values)
    assert s.mean == pytest.approx(np.mean(values))
    assert s.std == pytest.approx(statistics.stdev(values))
    if s.std:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert s.mean - s.ci95 == pytest.approx(low)
        assert s.mean + s.ci95 == pytest.approx(high)
    else:
        assert s.ci95 == 0


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228)])
def test_the_interval_uses_the_t_of_printed_tables(n, t):
    values = [0.0] * (n - 1) + [1.0]
    s = summarise(values)
    assert s.ci95 * math.sqrt(n) / s.std == pytest.approx(t, abs=6e-4)


def test_one_value_has_no_deviation_and_none_is_an_error():
    s = summarise([3.0])
    assert (s.n, s.mean) == (1, 3.0)
    assert math.isnan(s.std)
    assert math.isnan(s.ci95)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_the_best_leads_every_other_by_more_than_either_deviation():
    task = TASKS["eurosat_s2"]
    clear = board(eurosat_s2={"a": [90, 91, 92], "b": [80, 81, 82], "c": [70, 71, 72]})
    assert clear.best(task) == "a"
    close = board(eurosat_s2={"a": [90, 91, 92], "b": [89.5, 90.5, 91.5]})  # leads by 0.5, deviations 1
    assert close.best(task) is None
    noisy = board(eurosat_s2={"a": [90, 91, 92], "b": [80, 85, 90]})  # leads by 6, the other's deviation is 5
    assert noisy.best(task) == "a"
    noisier = board(eurosat_s2={"a": [90, 91, 92], "b": [78, 85, 92]})  # leads by 6, the other's deviation is 7
    assert noisier.best(task) is None
    third = board(eurosat_s2={"a": [90, 91, 92], "b": [70, 71, 72], "c": [89, 91, 92]})
    assert third.best(task) is None


def test_of_errors_the_smallest_leads():
    errors = board(aq_no2_s5p={"a": [3.0, 3.1, 3.2], "b": [2.0, 2.1, 2.2]})
    assert not TASKS["aq_no2_s5p"].higher_is_better
    assert errors.best(TASKS["aq_no2_s5p"]) == "b"
    assert errors.wins("b", "a") == 1
    assert errors.wins("a", "b") == 0


def test_one_seed_separates_nothing():
    single = board(eurosat_s2={"a": [90.0], "b": [10.0, 11.0, 12.0]})
    assert single.best(TASKS["eurosat_s2"]) is None
    assert single.wins("a", "b") == single.wins("b", "a") == 0


def test_equal_scores_are_no_win():
    same = board(eurosat_s2={"a": [90.0, 90.0], "b": [90.0, 90.0]})
    assert same.best(TASKS["eurosat_s2"]) is None
    assert same.wins("a", "b") == 0


def test_wins_count_tasks_of_either_direction():
    both = board(
        eurosat_s2={"pretrained": [90, 91, 92], "random": [80, 81, 82]},
        cloud_s3={"pretrained": [60, 61, 62], "random": [59.5, 60.5, 61.5]},
        flood_s1={"pretrained": [50, 51, 52], "random": [60, 61, 62]},
        aq_no2_s5p={"pretrained": [1.0, 1.1, 1.2], "random": [2.0, 2.1, 2.2]},
    )
    assert both.wins("pretrained", "random") == 2
    assert both.wins("random", "pretrained") == 1


FAILED = board(
    eurosat_s2={"pretrained": [90.0, 91.0, 92.0], "random": [80.0, 81.0, 82.0]},
    aq_no2_s5p={"pretrained": [1.0, 1.1, 1.2]},
)


def test_a_failed_cell_is_said_to_have_failed():
    assert FAILED.summary("aq_no2_s5p", "random") is None
    assert FAILED.wins("pretrained", "random") == 1
    lines = FAILED.markdown().splitlines()
    row = next(line for line in lines if TASKS["aq_no2_s5p"].title in line)
    assert "| failed |" in row


def test_markdown_holds_every_mean_and_deviation():
    lines = FAILED.markdown().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    assert cells[0][:4] == ["task", "metric", "pretrained", "random"]
    assert cells[2][:4] == [TASKS["eurosat_s2"].title, "OA ↑", "91.00 ± 1.00 *", "81.00 ± 1.00"]
    assert cells[3][1:4] == ["RMSE ↓", "1.10 ± 0.10 *", "failed"]
    published = TASKS["eurosat_s2"].published["copernicus_fm_vit_b16"]
    assert published is not None
    assert cells[2][4] == f"{published[0]:.1f} ± {published[1]:.1f}"
    assert "over 3 seeds" in lines[-1]


def test_the_caption_says_how_many_seeds():
    assert "over 2-3 seeds" in board(eurosat_s2={"a": [1, 2], "b": [1, 2, 3]}).caption


def test_the_terminal_table_says_the_same_as_markdown():
    text = io.StringIO()
    Console(file=text, width=200).print(FAILED.table())
    for part in ("91.00 ± 1.00 *", "81.00 ± 1.00", "1.10 ± 0.10", "failed", TASKS["eurosat_s2"].title):
        assert part in text.getvalue()


@pytest.mark.parametrize(("count", "failed"), [(1, False), (4, False), (4, True)])
def test_the_picture_has_a_panel_for_each_task(count, failed, tmp_path):
    from matplotlib.image import imread

    names = list(TASKS)[:count]
    cells = {"a": [1.0, 2.0, 3.0], "b": [4.0], "c": [2.0, 2.0]}
    scores = board(**{name: {e: v for e, v in cells.items() if not (failed and e == "b")} for name in names[:1]},
                   **dict.fromkeys(names[1:], cells))  # fmt: skip
    path = scores.picture(tmp_path / "below" / "leaderboard.png")
    pixels = imread(path)
    columns = min(4, len(names))
    assert pixels.shape[1] == pytest.approx(130 * (1.2 + 2.9 * columns), abs=1)
    assert pixels.shape[0] == pytest.approx(130 * 3.6, abs=1)
    panel = pixels[:, pixels.shape[1] // columns * (columns - 1) :, :3]
    assert np.unique(panel.reshape(-1, 3), axis=0).shape[0] > 20, "the last panel is drawn, in colours"


def test_a_picture_shows_the_values(tmp_path):
    """Another value, another picture; the same values, the same one."""
    from matplotlib.image import imread

    one, same, other = (
        imread(board(eurosat_s2={"a": [80.0, 82.0, 84.0], "b": [60.0, top]}).picture(Path(tmp_path / f"{i}.png")))
        for i, top in enumerate((61.0, 61.0, 75.0))
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
