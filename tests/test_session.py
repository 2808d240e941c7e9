"""What Ray tells of its nodes, on a terminal."""

from __future__ import annotations

from typing import Any

from ray._private import worker

from copernicus.platform.session import LONGEST, brief, silence


def test_what_nodes_say_is_shown_once_and_in_a_line():
    shown: list[tuple[dict[str, Any], bool]] = []
    tell = brief(lambda data, ignore_prefix: shown.append((data, ignore_prefix)))
    death = (
        "Raylet is terminated. Termination is unexpected. Last 20 lines of the Raylet logs:\n    [12:00] one\n    two"
    )
    tell({"pid": "raylet", "lines": [death]}, ignore_prefix=False)
    tell({"pid": "raylet", "lines": [death]}, ignore_prefix=False)
    tell({"pid": "raylet", "lines": ["word " * 100]}, ignore_prefix=False)
    (first, prefix), (second, _) = shown
    assert first == {"pid": "raylet", "lines": ["Raylet is terminated. Termination is unexpected."]}
    assert prefix is False
    (line,) = second["lines"]
    assert line.endswith("word ...")
    assert len(line) <= LONGEST + 4


def test_it_stands_in_for_ray_s_own(monkeypatch, capsys):
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # put back afterwards
    silence()
    worker.print_to_stdstream(
        {"lines": ["the node died\nand more"], "pid": "raylet", "is_err": False}, ignore_prefix=False
    )
    printed = "".join(capsys.readouterr())
    assert "the node died" in printed
    assert "and more" not in printed
