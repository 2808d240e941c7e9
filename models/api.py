"""The public names of ``copernicus.models``."""

from copernicus.models.dofa import DOFA
from copernicus.models.encoder import Encoder, raw_values
from copernicus.models.heads import DenseHead, LinearHead
from copernicus.models.language import LanguageTable
from copernicus.models.masked_autoencoder import MaskedAutoencoder, parameter_groups
from copernicus.models.plain import PlainViT
from copernicus.models.vit import CopernicusFMViT
from copernicus.models.weights import LoadReport, load_weights
from copernicus.models.zoo import ZOO, create_encoder, create_model

__all__ = [
    "DOFA",
    "ZOO",
    "CopernicusFMViT",
    "DenseHead",
    "Encoder",
    "LanguageTable",
    "LinearHead",
    "LoadReport",
    "MaskedAutoencoder",
    "PlainViT",
    "create_encoder",
    "create_model",
    "load_weights",
    "parameter_groups",
    "raw_values",
]
