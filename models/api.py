"""The public names of ``copernicus.models``."""

from copernicus.models.heads import DenseHead, LinearHead
from copernicus.models.language import LanguageTable
from copernicus.models.masked_autoencoder import MaskedAutoencoder, parameter_groups
from copernicus.models.vit import CopernicusFMViT
from copernicus.models.weights import LoadReport, load_weights
from copernicus.models.zoo import ZOO, create_model

__all__ = [
    "ZOO",
    "CopernicusFMViT",
    "DenseHead",
    "LanguageTable",
    "LinearHead",
    "LoadReport",
    "MaskedAutoencoder",
    "create_model",
    "load_weights",
    "parameter_groups",
]
