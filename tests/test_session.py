"""What Ray tells of its nodes, on a terminal."""

from __future__ import annotations

from typing import Any

import ray
from ray._private import worker

from copernicus.platform.session import LONGEST, brief, ray_session


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


def test_it_stands_in_for_ray_s_own_while_a_session_lasts(monkeypatch, capsys):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    whole = worker.print_to_stdstream
    with ray_session():
        worker.print_to_stdstream(
            {"lines": ["the node died\nand more"], "pid": "raylet", "is_err": False}, ignore_prefix=False
        )
    assert worker.print_to_stdstream is whole
    printed = "".join(capsys.readouterr())
    assert "the node died" in printed
    assert "and more" not in printed
