"""What only a GPU can show; skipped without one. Needs neither Ray nor data:

    d=$(mktemp -d) && cp -r platform/_package $d/copernicus && ln -s $PWD/models $PWD/datasets $PWD/platform \
        $d/copernicus/ && PYTHONPATH=$d pytest --noconftest tests/test_gpu.py
"""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_models_mae import METADATA, NOISE, SAMPLES, published_model, small_model

from copernicus.datasets.sensors import SENSORS
from copernicus.models import create_model
from copernicus.platform.to_device import on_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CHANNELS = {"s2_toa": [12, 3, 7, 0], "s3_olci": [4, 2, 20]}


def there(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def test_losses_and_gradients_are_those_of_the_processor():
    here, gpu = small_model(), small_model().cuda()
    expected = here(SAMPLES, SENSORS, METADATA, NOISE, CHANNELS)
    losses = gpu(there(SAMPLES), SENSORS, there(METADATA), there(NOISE), CHANNELS)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name].cpu(), loss, atol=0, rtol=1e-4)
    expected["loss"].backward()
    losses["loss"].backward()
    for (name, a), b in zip(here.named_parameters(), gpu.parameters(), strict=True):
        if a.grad is not None:
            difference = (a.grad - b.grad.cpu()).norm()
            assert difference <= 1e-3 * a.grad.norm() + 1e-7, name


def test_compiled_blocks_give_the_same_losses_under_autocast():
    eager, compiled = published_model().cuda(), published_model().cuda()
    compiled.compile_blocks()
    images, metadata, noise = there(SAMPLES), there(METADATA), there(NOISE)
    with torch.autocast("cuda", torch.bfloat16):
        for name, sensor in SENSORS.items():
            a, b = (
                m.forward_sensor(images[name], sensor, metadata[name], noise[name]).pred_BLV for m in (eager, compiled)
            )
            assert ((a - b).norm() / a.norm()).item() < 0.02, name
        compiled(images, SENSORS, metadata, noise)["loss"].backward()


def test_a_step_waits_for_the_gpu_nowhere():
    model = small_model().cuda()
    batch = there(SAMPLES), SENSORS, there(METADATA), there(NOISE)
    for channels in (CHANNELS, {"s2_toa": [1, 2, 3]}):
        images = {name: sensor.normalize(batch[0][name]) for name, sensor in SENSORS.items()}
        model(images, *batch[1:], channels)["loss"].backward()  # what is made once is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = {name: sensor.normalize(batch[0][name]) for name, sensor in SENSORS.items()}
        model(images, *batch[1:], {"s2_toa": [3, 1, 2]})["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prefetched_batches_arrive_whole_and_in_order():
    rng = np.random.default_rng(0)
    columns = [
        {
            "x_s1_grd": rng.standard_normal((64, 2, 224, 224), np.float32),
            "metadata": np.full((64, 1, 4), np.nan, np.float32),
            "key": np.array(["a"] * 64),
            "problems": np.array(["[]"] * 64),
            "epoch": np.zeros(64, np.int32),
        }
        for _ in range(6)
    ]
    seen = []
    for given, batch in on_device(iter(columns), torch.device("cuda")):
        work = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):  # the GPU is kept busy, so that the next copy runs beside it
            work = work @ work / 4096
        total = batch["x_s1_grd"].double().sum()
        batch["x_s1_grd"].zero_()  # memory that is given back too early would spoil the next batch
        seen.append((given, total))
        del batch
    assert len(seen) == len(columns)
    for given, ((columns_seen, total), expected) in zip(columns, zip(seen, columns, strict=True), strict=True):
        assert columns_seen is given
        assert total.item() == pytest.approx(float(expected["x_s1_grd"].astype(np.float64).sum()), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("sensor", SENSORS.values(), ids=list(SENSORS))
def test_features_are_those_of_the_processor(sensor):
    """With kernels made, and with those kept from the pass before."""
    here = create_model("copernicus_fm_base", embed_dim=64, depth=2, num_heads=4, global_pool=True).eval()
    gpu = copy.deepcopy(here).cuda()
    x_BCHW = torch.randn(2, sensor.channels, 4 * sensor.patch_kernel, 4 * sensor.patch_kernel)
    metadata = torch.tensor([[7.0, 47.0, 18262.0, 6.6]] * 2)
    with torch.inference_mode():
        expected = here.encode(x_BCHW, sensor, metadata, normalize=False)
        for _ in range(2):
            found = gpu.encode(x_BCHW.cuda(), sensor, metadata.cuda(), normalize=False)
            torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=1e-3)
