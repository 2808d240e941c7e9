"""Small stand-ins for encoders, with the protocol that features and probes ask for."""

import torch
from torch import Tensor, nn


class GridEncoder(nn.Module):
    """Random projections of the pixels of each patch, with a position term so that flips matter."""

    def __init__(self, channels: int, dim: int = 8, patch: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.patch = patch
        self.kernel = nn.Parameter(
            torch.randn(dim, channels, patch, patch, generator=generator) / (channels**0.5 * patch)
        )
        self.calls = 0

    def encode_dense(self, x_BCHW: Tensor, sensor, metadata=None, normalize=True) -> list[Tensor]:
        assert not normalize
        assert metadata.shape == (len(x_BCHW), 4)
        self.calls += 1
        z_BDhw = nn.functional.conv2d(x_BCHW, self.kernel, stride=self.patch)
        position = torch.linspace(0, 1, z_BDhw.shape[-1]) + 2 * torch.linspace(0, 1, z_BDhw.shape[-2])[:, None]
        z_BDhw = z_BDhw + position
        return [z_BDhw, z_BDhw.tanh()]

    def encode(self, x_BCHW: Tensor, sensor, metadata=None, normalize=True) -> Tensor:
        z_BDhw = self.encode_dense(x_BCHW, sensor, metadata, normalize)[1]
        return torch.cat([z_BDhw[..., :1].mean((-2, -1)), z_BDhw.mean((-2, -1))], dim=1)


class BandMeans(nn.Module):
    """Mean and deviation of every band: (B, 2 C)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, x_BCHW: Tensor, sensor, metadata=None, normalize=True) -> Tensor:
        assert not normalize
        return self.scale * torch.cat([x_BCHW.mean((-2, -1)), x_BCHW.std((-2, -1))], dim=1)

    def encode_dense(self, x_BCHW: Tensor, sensor, metadata=None, normalize=True) -> list[Tensor]:
        return [self.scale * nn.functional.avg_pool2d(x_BCHW, sensor.patch_kernel)]
