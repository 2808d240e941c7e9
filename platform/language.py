"""Which language embeddings a run uses: opened on the driver, told to the user and to MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from copernicus.datasets.sensors import Sensor
from copernicus.models.language import LanguageTable


def open_language(source: str | None) -> LanguageTable:
    """The file's embeddings, or stand-ins alone.

    Raises:
        InputError: see `LanguageTable.load`.
    """
    return LanguageTable.load(source) if source else LanguageTable()


def variables(sensors: Iterable[Sensor]) -> list[str]:
    """Names of the variables among the sensors, each once."""
    return list(dict.fromkeys(s.variable for s in sensors if not s.spectral))


def language_warning(table: LanguageTable, names: Iterable[str], trained: Mapping[str, str] | None = None) -> str:
    """One line on embeddings that bear no meaning, or are not those that weights were trained with; empty where all is
    well.

    Args:
        names: the variables in use.
        trained: a checkpoint's record (`LanguageTable.digests`).
    """
    names = list(names)
    lines = []
    if lacking := table.lacking(names):
        lines.append(
            f"no language embedding for {', '.join(map(repr, lacking))}: stand-ins drawn from the names are used, which "
            "weights pretrained with the published embeddings do not know"
        )
    if other := table.differing({n: digest for n, digest in (trained or {}).items() if n in names}):
        lines.append(f"the weights were pretrained with other language embeddings of {', '.join(map(repr, other))}")
    return "; ".join(lines)
