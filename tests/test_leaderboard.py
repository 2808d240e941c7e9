"""The leaderboard: who leads, what is missing, how it is shown and kept."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from boards import plan_cells
from matplotlib.image import imread
from rich.console import Console
from scipy import stats

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import InputError
from copernicus.platform.board_files import read_leaderboard, write_leaderboard
from copernicus.platform.figures import draw_aggregates, draw_curves, draw_panels, draw_ranks
from copernicus.platform.leaderboard import Leaderboard, Score, join, mean_curve
from copernicus.platform.tables import document, pair_csv, score_csv, terminal


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


def test_who_is_alone_leads_nobody():
    assert board(eurosat_s2={"a": [90.0, 91.0]}).best(TASKS["eurosat_s2"]) is None


def test_wins_count_tasks_of_either_direction():
    both = board(
        eurosat_s2={"pretrained": [90, 91, 92], "random": [80, 81, 82]},
        cloud_s3={"pretrained": [60, 61, 62], "random": [59.5, 60.5, 61.5]},
        flood_s1={"pretrained": [50, 51, 52], "random": [60, 61, 62]},
        aq_no2_s5p={"pretrained": [1.0, 1.1, 1.2], "random": [2.0, 2.1, 2.2]},
    )
    assert both.wins("pretrained", "random") == 2
    assert both.wins("random", "pretrained") == 1


HALF = dataclasses.replace(
    board(
        eurosat_s2={"pretrained": [90.0, 91.0, 92.0], "random": [80.0, 81.0, 82.0]},
        aq_no2_s5p={"pretrained": [1.0, 1.1], "random": []},
    ),
    planned=plan_cells(["eurosat_s2", "aq_no2_s5p", "flood_s1"], ["pretrained", "random"], [0, 1, 2]),
    failures={("aq_no2_s5p", "random"): "out of memory"},
    notes=("a | note",),
)


def test_what_is_missing_of_the_plan_is_said():
    assert HALF.status("eurosat_s2", "random") == ""
    assert HALF.missing() == [
        ("aq_no2_s5p", "pretrained", "2 of 3 seeds"),
        ("aq_no2_s5p", "random", "failed: out of memory"),
        ("flood_s1", "pretrained", "missing"),
        ("flood_s1", "random", "missing"),
    ]
    assert HALF.summary("aq_no2_s5p", "random") is None
    assert HALF.wins("pretrained", "random") == 1
    assert [t.name for t in HALF.tasks] == ["eurosat_s2", "aq_no2_s5p", "flood_s1"]


def test_without_a_plan_every_task_is_expected_of_every_encoder():
    found = board(eurosat_s2={"a": [1.0], "b": [2.0]}, flood_s1={"a": [3.0]})
    assert found.missing() == [("flood_s1", "b", "missing")]


def test_markdown_holds_every_mean_deviation_and_interval():
    lines = HALF.markdown().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    assert cells[0][:4] == ["task", "metric", "pretrained", "random"]
    assert cells[2][:4] == [
        TASKS["eurosat_s2"].title,
        "OA ↑",
        "91.00 ± 1.00 [90.00, 92.00] *",
        "81.00 ± 1.00 [80.00, 82.00]",
    ]
    assert cells[3][1:4] == ["RMSE ↓", "1.05 ± 0.07 [1.00, 1.10] (2 of 3 seeds)", "failed: out of memory"]
    assert cells[4][2:4] == ["missing", "missing"]
    published = TASKS["eurosat_s2"].published["copernicus_fm_vit_b16"]
    assert published is not None
    assert cells[2][4] == f"{published[0]:.1f} ± {published[1]:.1f}"
    assert "over 2-3 seeds" in lines[-1]
    assert "75 % with 3 seeds" in lines[-1]


def test_a_caption_of_many_seeds_does_not_warn():
    assert "too narrow" not in board(eurosat_s2={"a": list(range(20))}).caption
    assert "interval" not in board(eurosat_s2={"a": [1.0]}).caption
    assert "over 1 seed." in board(eurosat_s2={"a": [1.0]}).caption


def test_the_terminal_says_what_is_in_the_table_what_is_missing_and_the_notes():
    text = io.StringIO()
    console = Console(file=text, width=200)
    for shown in terminal(HALF):
        console.print(shown)
    for part in ("91.00 ± 1.00 *", "90.00 – 92.00", "81.00 ± 1.00", "1.05 ± 0.07", "failed", "EuroSAT-S2", "a | note",
                 "aq_no2_s5p / random: failed: out of memory", "flood_s1 / random: missing",
                 "pretrained is better than random on 1 of 1 tasks"):  # fmt: skip
        assert part in text.getvalue(), part


def test_names_are_shown_as_they_are_whatever_they_mean_elsewhere():
    """An encoder's name comes from a YAML: it is neither markup of the terminal nor a column of Markdown."""
    odd = "[bold]a|b[/] <c> `$x$`"
    found = board(eurosat_s2={odd: [1.0, 2.0], "b": [3.0, 4.0]}, flood_s1={odd: [1.0, 2.0], "b": [3.0, 4.0]})
    text = io.StringIO()
    console = Console(file=text, width=250)
    for shown in terminal(found):
        console.print(shown)
    assert text.getvalue().count(odd) == 3
    rows = [line for line in document(found).splitlines() if line.startswith("| EuroSAT-S2 |")]
    assert "\\|b" in document(found)
    assert rows[0].replace("\\|", "").count("|") == 7


def test_the_whole_document_has_its_sections():
    text = document(HALF)
    for heading in ("Missing", "Over tasks", "Paired tests over tasks", "Paired tests on each task", "Best settings"):
        assert f"## {heading}\n" in text
    assert "- aq\\_no2" not in text
    assert "DOFA B/16" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for block in tables:
        assert len({line.replace("\\|", "").count("|") for line in block.strip().splitlines()}) == 1


def test_csv_has_a_row_for_every_task_and_encoder():
    scored = dataclasses.replace(
        HALF,
        scores=tuple(
            dataclasses.replace(s, settings={"lr": 0.1}, batchmean=s.test + 0.5, run_id=f"r{s.seed}")
            for s in HALF.scores
        ),
    )
    rows = {(r["task"], r["encoder"]): r for r in csv.DictReader(io.StringIO(score_csv(scored)))}
    assert len(rows) == 6
    row = rows["eurosat_s2", "pretrained"]
    assert (row["n"], row["planned"], row["status"], row["protocol"]) == ("3", "3", "", "probe")
    assert [float(row[k]) for k in ("mean", "std", "ci_low", "ci_high")] == pytest.approx([91, 1, 90, 92])
    t = stats.t.interval(0.95, 2, loc=91, scale=1 / 3**0.5)
    assert [float(row[k]) for k in ("t_low", "t_high")] == pytest.approx(t)
    assert (float(row["batchmean"]), float(row["val_mean"]), float(row["rank"])) == pytest.approx((91.5, 90, 1))
    assert float(row["normalised"]) == pytest.approx((91 - 92.5) / (97.9 - 92.5))
    assert json.loads(row["settings"]) == {"lr": 0.1}
    assert row["run_ids"] == "r0 r1 r2"
    assert (row["published_dofa_vit_b16"], row["published_dofa_vit_b16_std"]) == ("97.2", "0.1")
    assert rows["aq_no2_s5p", "random"]["status"] == "failed: out of memory"
    assert rows["aq_no2_s5p", "random"]["mean"] == rows["aq_no2_s5p", "random"]["published_croma_vit_b8"] == ""


def test_the_csv_of_tests_holds_both_kinds():
    rows = list(csv.DictReader(io.StringIO(pair_csv(HALF))))
    assert [(r["test"], r["task"], r["n"]) for r in rows] == [
        ("wilcoxon over tasks", "", "1"),
        ("paired t over seeds", "eurosat_s2", "3"),
    ]
    assert float(rows[0]["p"]) == 1
    assert rows[1]["p"] == "", "the three differences are the same"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            [Score("eurosat_s2", "a", 1, 1.0, 1.0), Score("eurosat_s2", "a", 1, 2.0, 1.0)],
            "two scores of a on eurosat_s2",
        ),
        (
            [Score("eurosat_s2", "a", 1, 1.0, 1.0), Score("eurosat_s2", "a", 2, 1.0, 1.0, protocol="knn")],
            "knn and probe",
        ),
        ([Score("eurosat_s9", "a", 1, 1.0, 1.0)], "no task 'eurosat_s9'"),
    ],
)
def test_scores_that_do_not_go_together_are_refused(scores, message):
    with pytest.raises(InputError, match=message):
        Leaderboard(tuple(scores))


def test_joined_leaderboards_keep_their_encoders_and_plans_apart():
    other = board(flood_s1={"random": [50.0]})
    both = join({"one": HALF, "two": other})
    assert both.encoders == ["one/pretrained", "one/random", "two/random"]
    assert both.values("flood_s1", "two/random") == [50.0]
    assert both.status("eurosat_s2", "two/random") == "not planned"
    assert both.status("aq_no2_s5p", "one/random") == "failed: out of memory"
    assert len(both.missing()) == len(HALF.missing())
    assert both.notes == ("one: a | note",)
    assert join({"one": HALF}) is HALF


@pytest.mark.parametrize("count", [1, 4])
def test_the_picture_has_a_panel_for_each_task(count, tmp_path):
    names = list(TASKS)[:count]
    cells = {"a": [1.0, 2.0, 3.0], "b": [4.0], "c": [2.0, 2.0]}
    pixels = imread(draw_panels(board(**dict.fromkeys(names, cells)), tmp_path / "below" / "leaderboard.png"))
    columns = min(4, len(names))
    assert pixels.shape[1] == pytest.approx(130 * (1.2 + 2.9 * columns), abs=1)
    assert pixels.shape[0] == pytest.approx(130 * 3.6, abs=1)
    panel = pixels[:, pixels.shape[1] // columns * (columns - 1) :, :3]
    assert np.unique(panel.reshape(-1, 3), axis=0).shape[0] > 20, "the last panel is drawn, in colours"


def test_a_picture_shows_the_values_and_what_failed(tmp_path):
    """Another value, another picture; the same values, the same one; a failure in red."""
    one, same, other = (
        imread(draw_panels(board(eurosat_s2={"a": [80.0, 82.0, 84.0], "b": [60.0, top]}), tmp_path / f"{i}.png"))
        for i, top in enumerate((61.0, 61.0, 75.0))
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    firebrick = np.array([178, 34, 34]) / 255
    assert (np.abs(imread(draw_panels(HALF, tmp_path / "half.png"))[..., :3] - firebrick) < 0.02).all(-1).any()
    assert not (np.abs(one[..., :3] - firebrick) < 0.02).all(-1).any()


def test_aggregates_curves_and_ranks_are_drawn_where_there_is_something(tmp_path):
    curves = dataclasses.replace(
        HALF, scores=tuple(dataclasses.replace(s, curve=tuple(np.linspace(1, s.test, 5 + s.seed))) for s in HALF.scores)
    )
    for draw, found in ((draw_aggregates, HALF), (draw_curves, curves), (draw_ranks, HALF)):
        path = draw(found, tmp_path / f"{draw.__name__}.png")
        assert path is not None
        assert np.unique(imread(path)[..., :3].reshape(-1, 3), axis=0).shape[0] > 20
    assert draw_curves(HALF, tmp_path / "none.png") is None
    assert draw_aggregates(board(eurosat_s2={"a": [1.0]}, flood_s1={"b": [1.0]}), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_a_mean_curve_ends_where_the_first_seed_does():
    scores = [Score("eurosat_s2", "a", s, 1.0, 1.0, curve=c) for s, c in enumerate([(1.0, 2.0, 3.0), (3.0, 4.0), ()])]
    found = Leaderboard(tuple(scores))
    np.testing.assert_array_equal(mean_curve(found, TASKS["eurosat_s2"], "a"), [2.0, 3.0])
    assert mean_curve(found, TASKS["eurosat_s2"], "b") is None


def test_a_leaderboard_reads_back_as_it_was_written(tmp_path):
    scored = dataclasses.replace(
        HALF,
        scores=tuple(
            dataclasses.replace(s, settings={"lr": 0.1, "epochs": 5}, curve=(1.0, 2.0), batchmean=3.0, run_id="r")
            for s in HALF.scores
        ),
    )
    files = write_leaderboard(scored, tmp_path / "below")
    assert {f.name for f in files} == {
        "leaderboard.json", "leaderboard.md", "leaderboard.csv", "leaderboard_tests.csv", "leaderboard.html",
        "leaderboard.png", "leaderboard_aggregates.png", "leaderboard_curves.png", "leaderboard_ranks.png",
    }  # fmt: skip
    assert {f.name for f in (tmp_path / "below").iterdir()} == {f.name for f in files}, "nothing half written is left"
    read = read_leaderboard(tmp_path / "below")
    assert read == scored
    assert (read.planned, read.failures) == (scored.planned, scored.failures)
    assert [s.settings for s in read.scores] == [s.settings for s in scored.scores]


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "{}", '{"scores": [{"task": "eurosat_s2"}]}'])
def test_what_is_no_leaderboard_is_said_to_be_none(tmp_path, text):
    if text is not None:
        (tmp_path / "leaderboard.json").write_text(text)
    with pytest.raises(InputError, match=r"no leaderboard in .*finished sweep"):
        read_leaderboard(tmp_path)
