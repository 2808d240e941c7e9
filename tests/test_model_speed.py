"""The model benchmark's own parts: both sides take the same step, and what is counted is what torch counts."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from copernicus.datasets.sensors import SENSORS

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from modelling.child import Clock, peak_bytes
from modelling.flops import block, forward_flops, product_shapes
from modelling.kinds import kind_of, seconds_by_kind
from modelling.sides import make_side
from modelling.work import CASES, MASK_RATIO, Batch, Shape, encoder_input
from public_formulation import RGB, PublicAutoencoder

TINY = Shape(32, 1, 2, 16, 1, 2)


def test_both_sides_take_the_same_step():
    batch = Batch.make(2, "cpu")
    marks: dict[str, list[str]] = {"public": [], "ours": []}
    losses = {name: make_side(name, TINY, "cpu", marks[name].append).step(batch) for name in marks}
    assert marks["public"] == marks["ours"] == ["forward", "backward", "optimiser"]
    assert set(losses["ours"]) == set(losses["public"]) == {"total", "distill", *SENSORS}
    for name, value in losses["public"].items():
        torch.testing.assert_close(losses["ours"][name], value, atol=0, rtol=1e-5)


@pytest.mark.parametrize("title", [title for title in CASES if not title.startswith("dem")])
def test_both_sides_encode_alike(title):
    x, metadata = encoder_input(CASES[title], 1, "cpu")
    features = [make_side(name, TINY, "cpu", print).encode(x, metadata, CASES[title]) for name in ("ours", "public")]
    torch.testing.assert_close(*features, atol=1e-5, rtol=0)


def public_flops(batch: int) -> int:
    """What torch counts in the public model's forward pass on the benchmark's own input."""
    given = Batch.make(batch, "cpu")
    language = {s.variable: torch.randn(2048) for s in SENSORS.values() if s.variable}
    model = PublicAutoencoder(language, **TINY.encoder, **TINY.decoder)
    s2 = given.samples["s2_toa"][:, [3, 2, 1]]
    samples = {**given.samples, RGB: s2}
    sensors = {**SENSORS, RGB: SENSORS["s2_toa"].select((3, 2, 1))}
    metadata = {**given.metadata, RGB: given.metadata["s2_toa"]}
    noise = {**given.noise, RGB: given.noise["s2_toa"]}
    # Attention spelled out: the counter knows its products, not the fused kernel of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(samples, sensors, metadata, noise, given.channels, lambda rgb: torch.zeros(batch, 1, 768))
    return counter.get_total_flops()


def test_operations_are_those_that_torch_counts_less_what_is_not_needed():
    """The public model embeds hidden patches, and predicts visible ones and the class token."""
    counted = {batch: public_flops(batch) for batch in (1, 2)}
    given = Batch.make(1, "cpu").channels
    unneeded = 0
    for name, sensor in SENSORS.items():
        channels = len(given.get(name, range(sensor.channels)))
        tokens = (sensor.image_size // sensor.patch_kernel) ** 2
        kept = int(tokens * (1 - MASK_RATIO))
        values = channels * sensor.patch_kernel**2
        unneeded += 2 * (tokens - kept) * values * TINY.embed_dim + 2 * (kept + 1) * values * TINY.decoder_embed_dim
    ours = {batch: sum(forward_flops(TINY, batch).values()) for batch in (1, 2)}
    assert counted[2] - counted[1] == ours[2] - ours[1] + unneeded
    # What a step needs once, however many rows: beside ours, the unused bias of eight predictions.
    unused = len(SENSORS) * 2 * 128 * TINY.decoder_embed_dim
    assert 2 * counted[1] - counted[2] == 2 * ours[1] - ours[2] + unused


def test_a_block_s_operations_are_its_products():
    tokens, dim = 5, 8
    linear = [(tokens, dim, 3 * dim), (tokens, dim, dim), (tokens, dim, 4 * dim), (tokens, 4 * dim, dim)]
    attention = [(tokens, dim, tokens), (tokens, tokens, dim)]
    assert block(tokens, dim) == sum(2 * m * k * n for m, k, n in linear + attention)
    assert [columns for _, _, columns in product_shapes(TINY, 1)] == [96, 32, 128, 32, 48, 16, 64, 16]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"), ("aten::mkldnn_convolution", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"), ("nvjet_hsh_128x256_64x4", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"), ("aten::linalg_svd", "SVD, interpolation"), ("triton_poi_fused_gelu_1", "fused by the compiler"),
        ("aten::native_layer_norm", "normalisation, softmax, sums"), ("aten::gelu", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimiser"),
        ("Memcpy HtoD (Pageable -> Device)", "copies, gathers"), ("aten::_to_copy", "copies, gathers"),
    ],
)  # fmt: skip
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_time_by_kind_tells_the_optimiser_s_operators_from_the_model_s():
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(8, 64)).square().mean().backward()
        optimizer.step()

    step()
    seconds: Counter[str] = seconds_by_kind(step, cuda=False)
    assert set(seconds) >= {"matrix products", "optimiser"}
    assert all(value >= 0 for value in seconds.values())
    frozen = seconds_by_kind(lambda: model(torch.ones(8, 64)), cuda=False)
    assert frozen["optimiser"] == 0


def test_the_clock_gives_each_part_once_a_call_and_starts_anew():
    clock = Clock(cuda=False)
    for name in ("start", "forward", "backward", "forward", "backward"):
        clock.mark(name)
    assert {name: len(seconds) for name, seconds in clock.read().items()} == {"forward": 2, "backward": 2}
    assert clock.read() == {}
    assert peak_bytes(cuda=False) > 1e7
