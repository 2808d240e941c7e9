"""A leaderboard on disk: written in every form that it has, and read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from copernicus.datasets.sensors import InputError
from copernicus.datasets.storage import write_bytes
from copernicus.platform.leaderboard import Cell, Leaderboard, Score


def write_leaderboard(
    board: Leaderboard, folder: Path, title: str = "", pictures: Mapping[Cell, Sequence[Path]] | None = None
) -> list[Path]:
    """Write ``leaderboard.json`` (every score and what was planned), ``.md``, ``.csv``, ``_tests.csv`` (paired tests),
    ``.html`` (one page that needs nothing else) and the figures ``.png``, ``_aggregates.png``, ``_curves.png`` (where curves
    are known) and ``_ranks.png``.

    Args:
        title: heading of the page; empty: the folder's name.
        pictures: PNG or JPEG files to show in the page, by (task, encoder).

    Returns:
        the files written.
    """
    from copernicus.platform.figures import draw_aggregates, draw_curves, draw_panels, draw_ranks
    from copernicus.platform.report import page
    from copernicus.platform.tables import document, pair_csv, score_csv

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "leaderboard.json": to_json(board),
        "leaderboard.md": document(board),
        "leaderboard.csv": score_csv(board),
        "leaderboard_tests.csv": pair_csv(board),
        "leaderboard.html": page(board, title or folder.absolute().name, pictures or {}),
    }
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    figures = [
        draw_panels(board, folder / "leaderboard.png"),
        draw_aggregates(board, folder / "leaderboard_aggregates.png"),
        draw_curves(board, folder / "leaderboard_curves.png"),
        draw_ranks(board, folder / "leaderboard_ranks.png"),
    ]
    return [folder / name for name in texts] + [path for path in figures if path is not None]


def to_json(board: Leaderboard) -> str:
    return json.dumps(
        {
            "planned": [{"task": t, "encoder": e, "seeds": list(seeds)} for (t, e), seeds in board.planned.items()],
            "failures": [{"task": t, "encoder": e, "reason": why} for (t, e), why in board.failures.items()],
            "notes": list(board.notes),
            "scores": [dataclasses.asdict(score) for score in board.scores],
        },
        indent=1,
    )


def from_json(text: str) -> Leaderboard:
    """
    Raises:
        ValueError, TypeError, KeyError: it is no leaderboard.
    """
    read = json.loads(text)
    scores = [Score(**{**row, "curve": tuple(row["curve"])}) for row in read["scores"]]
    planned = {(row["task"], row["encoder"]): tuple(row["seeds"]) for row in read["planned"]}
    failures = {(row["task"], row["encoder"]): row["reason"] for row in read["failures"]}
    return Leaderboard(tuple(scores), planned, failures, tuple(read["notes"]))


def read_leaderboard(folder: Path) -> Leaderboard:
    """The leaderboard that an experiment's folder holds.

    Raises:
        InputError: it holds none.
    """
    try:
        return from_json((folder / "leaderboard.json").read_text())
    except InputError:  # a task that this version does not know: said as it is
        raise
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(
            f"no leaderboard in {folder}: give the folder of a finished sweep, such as runs/quickstart-*"
        ) from None
