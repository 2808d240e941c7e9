"""Networks with weights of TorchGeo (>= 0.8) as encoders, where it is installed: ``torchgeo:ResNet50_Weights.ENTRY``.

Taken are entries pretrained on SSL4EO-S12 (MoCo, DINO, MAE, SoftCon, DeCUR; ResNets and ViTs), for their input units
are known: reflectance x 10000 and dB. Others would be fed wrongly in silence. DOFA and Copernicus-FM are models of our
zoo, which read TorchGeo's files of weights.
Shapes: B batch, C channels, H W image, D feature width, h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.blocks import default_levels
from copernicus.models.encoder import check_takes, raw_values

PREFIX = "torchgeo:"
DATASET = "SSL4EO-S12"
SENTINEL1 = {"VV", "VH"}
MAY_BE_MISSING = ("norm.", "head.", "fc.")
"""Not in all of TorchGeo's files: its own loading allows for these."""


class TorchGeoWeights:
    """One entry of TorchGeo's weights; calling it makes the encoder.

    Args:
        name: ``torchgeo:Class.ENTRY`` as TorchGeo names it, such as ``torchgeo:ViTSmall16_Weights.SENTINEL2_ALL_MOCO``.

    Raises:
        InputError: TorchGeo is not installed, or does not import; no such entry; or one whose input is not known here.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.models = _import_torchgeo(name)
        entry = name.removeprefix(PREFIX)
        try:
            self.entry = self.models.get_weight(entry)
        except ValueError:
            raise InputError(
                f"encoder {name!r}: TorchGeo has no such weights; write torchgeo:Class.ENTRY as in "
                "torchgeo:ViTSmall16_Weights.SENTINEL2_ALL_MOCO"
            ) from None
        meta = self.entry.meta
        if meta.get("dataset") != DATASET or not meta.get("bands"):
            raise InputError(
                f"encoder {name!r}: in which units it takes its bands is not known here, only for weights pretrained on "
                f"{DATASET}; write a small adapter of your own (CONTRIBUTING.md); DOFA is the zoo's dofa_base"
            )
        self.bands = tuple(_plain(band) for band in meta["bands"])
        self.units = "dB" if set(self.bands) <= SENTINEL1 else "reflectance x 10000"
        self.inputs = f"sensors in {self.units} with the bands {', '.join(meta['bands'])}"
        self.normalisation = _normalisation(name, self.entry.transforms)

    def takes(self, sensor: Sensor) -> bool:
        """Whether the sensor has the weights' bands, in their units."""
        return sensor.units == self.units and set(self.bands) <= {_plain(band) for band in sensor.bands}

    def __call__(self) -> TorchGeoEncoder:
        """The encoder with its weights, downloaded where TorchGeo has not kept them.

        Raises:
            InputError: the weights cannot be fetched, or do not fit.
        """
        meta = self.entry.meta
        options = {"img_size": meta["img_size"]} if "img_size" in meta else {}
        if str(meta["model"]).startswith("vit"):
            options["dynamic_img_size"] = options["dynamic_img_pad"] = True
        network = self.models.get_model(meta["model"], in_chans=meta["in_chans"], **options)
        try:  # not by get_model(weights=...), which unpickles
            state = self.entry.get_state_dict(progress=False, map_location="cpu", weights_only=True)
        except Exception as error:  # of network, disk or contents: as many kinds as ways to fail
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"encoder {self.name!r}: its weights cannot be fetched ({reason})") from error
        missing, unexpected = network.load_state_dict(state, strict=False)
        strange = [key for key in (*missing, *unexpected) if not key.startswith(MAY_BE_MISSING)]
        if strange:
            raise InputError(
                f"encoder {self.name!r}: its weights do not fit the network ({', '.join(strange[:4])} ...)"
            )
        return TorchGeoEncoder(network, self)


class TorchGeoEncoder(nn.Module):
    """A timm network that TorchGeo has weights for.

    Images keep their size; what TorchGeo would do besides normalising, resizing and cropping to 224 pixels, is the
    task's own matter here. Metadata is not read.
    """

    def __init__(self, network: nn.Module, source: TorchGeoWeights) -> None:
        super().__init__()
        self.network = network
        self.source = source
        self.inputs = source.inputs
        self.takes = source.takes

    def encode(self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Features (B, D) as the network pools them: a ViT's class token, a ResNet's mean."""
        network: Any = self.network
        return network.forward_head(network.forward_features(self._prepare(x_BCHW, sensor, normalize)), pre_logits=True)

    def encode_dense(
        self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None = None, normalize: bool = True
    ) -> list[Tensor]:
        """Maps (B, D, h, w): a ViT's patch tokens after the blocks of ``default_levels``, a ResNet's four stages."""
        network: Any = self.network
        levels: Sequence[int] = default_levels(len(network.blocks)) if hasattr(network, "blocks") else (1, 2, 3, 4)
        return network.forward_intermediates(
            self._prepare(x_BCHW, sensor, normalize), indices=list(levels), intermediates_only=True, norm=False
        )

    def _prepare(self, x_BCHW: Tensor, sensor: Sensor, normalize: bool) -> Tensor:
        check_takes(f"encoder {self.source.name!r}", self, sensor)
        x_BCHW = x_BCHW.to(next(self.network.parameters()).device)
        raw_BCHW = x_BCHW.float() if normalize else raw_values(x_BCHW, sensor)
        names = [_plain(band) for band in sensor.bands]
        x_BCHW = raw_BCHW[:, [names.index(band) for band in self.source.bands]]
        for mean, std in self.source.normalisation:
            x_BCHW = (x_BCHW - x_BCHW.new_tensor(mean)[:, None, None]) / x_BCHW.new_tensor(std)[:, None, None]
        return torch.nan_to_num(x_BCHW, nan=0.0, posinf=0.0, neginf=0.0)


def _import_torchgeo(name: str) -> Any:
    try:
        import torchgeo.models
    except ModuleNotFoundError as error:
        raise InputError(
            f"encoder {name!r}: {error.name} is not installed; pip install 'torchgeo>=0.8', with the torchvision that "
            "belongs to the torch in use"
        ) from error
    except Exception as error:  # torchvision's library beside another torch: RuntimeError, OSError, AttributeError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"encoder {name!r}: torchgeo does not import ({reason}); install the torchvision that belongs to torch "
            f"{torch.__version__}"
        ) from error
    return torchgeo.models


def _normalisation(name: str, transforms: Any) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """(mean, std) of each Normalize among the weights' transforms, in order.

    Raises:
        InputError: a transform whose meaning is not known here, or no Normalize.
    """
    steps = list(transforms.children())
    kinds = [type(step).__name__ for step in steps]
    if not set(kinds) <= {"Resize", "CenterCrop", "Normalize"} or "Normalize" not in kinds:
        raise InputError(
            f"encoder {name!r}: its transforms are {', '.join(kinds) or 'none'}; known are Resize, CenterCrop and "
            "Normalize (torchgeo >= 0.8)"
        )
    chosen = [step for step, kind in zip(steps, kinds, strict=True) if kind == "Normalize"]
    return tuple((tuple(map(float, step.mean)), tuple(map(float, step.std))) for step in chosen)


def _plain(band: str) -> str:
    """One spelling of a band's name: B8A for TorchGeo's B8a, B2 for our B02."""
    name = band.upper()
    return f"B{name[2:]}" if name.startswith("B0") else name
