"""A small procedural planet, seen by the sensors of Copernicus-Pretrain, in the published formats."""

from copernicus.datasets.miniature.preview import preview
from copernicus.datasets.miniature.write import MiniatureSummary, write_miniature

__all__ = ["MiniatureSummary", "preview", "write_miniature"]
