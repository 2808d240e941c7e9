"""Finished trials survive whatever ends the process that wrote them."""

from copernicus.platform.journal import FAILED, FINAL, FINISHED, SEARCH, STOPPED, Journal, Trial, best_trial


def trial(number: int, score: float | None, status: str = FINISHED, role: str = SEARCH, cell: str = "a") -> Trial:
    return Trial(cell, role, number, {"lr": 0.1}, {} if score is None else {"val/oa": score}, [{"x": 1.0}], status)


def test_what_was_added_is_found_again(tmp_path):
    journal = Journal(tmp_path / "trials.jsonl")
    added = [trial(0, 1.0), trial(1, None, FAILED), trial(5, 2.0, role=FINAL), trial(0, 3.0, cell="b")]
    for one in added:
        journal.add(one)
    again = Journal(tmp_path / "trials.jsonl")
    assert list(again.trials.values()) == added
    assert again.of("a", SEARCH) == added[:2]
    assert again.of("a", FINAL) == [added[2]]


def test_a_line_cut_off_by_a_kill_is_not_a_trial_and_harms_no_other(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    journal.add(trial(0, 1.0))
    journal.add(trial(1, 2.0))
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last):
        path.write_bytes(whole[:-cut])
        found = Journal(path)
        assert [t.number for t in found.trials.values()] == ([0, 1] if cut == 1 else [0])
        found.add(trial(7, 3.0))
        assert 7 in [t.number for t in Journal(path).trials.values()]


def test_a_failed_trial_that_was_run_again_counts_as_it_ended_last(tmp_path):
    journal = Journal(tmp_path / "trials.jsonl")
    journal.add(trial(0, None, FAILED))
    journal.add(trial(0, 4.0))
    assert [t.status for t in Journal(tmp_path / "trials.jsonl").of("a", SEARCH)] == [FINISHED]


def test_the_best_trial():
    trials = [trial(0, 1.0), trial(1, 5.0), trial(2, 5.0), trial(3, 9.0, STOPPED), trial(4, None, FAILED)]
    assert best_trial(trials, "oa", True) == trials[1], "a stopped one is no candidate; of equals the first"
    assert best_trial(trials, "oa", False) == trials[0]
    assert best_trial([trials[3], trials[4]], "oa", True) == trials[3], "unless there is nothing else"
    assert best_trial([trials[4]], "oa", True) is None
