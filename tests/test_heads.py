"""UPerNet against the same layers called one by one, its dropout, and low-rank adaptation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from copernicus.datasets import SENSORS, InputError
from copernicus.models import create_model
from copernicus.models.lora import add_lora, merge_lora
from copernicus.models.upernet import KeyedDropout2d, UPerNet, pick_levels

DIMS, WIDTH, CLASSES = (6, 8, 10, 12), 16, 3


def fields(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture(scope="module")
def levels() -> list[torch.Tensor]:
    return fields(0, *((2, dim, 6, 7) for dim in DIMS))


@pytest.fixture(scope="module")
def head() -> UPerNet:
    """With running statistics and affine parameters that are not those of a fresh batch norm."""
    head = UPerNet(DIMS, CLASSES, WIDTH, seed=1)
    generator = torch.Generator().manual_seed(5)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3, generator=generator)
    return head.eval()


def by_hand(p: dict[str, torch.Tensor], levels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Neck, UPerHead and FCNHead of mmsegmentation from a state dict with its names, in evaluation mode."""

    def norm(name, x):
        return F.batch_norm(
            x, p[f"{name}.running_mean"], p[f"{name}.running_var"], p[f"{name}.weight"], p[f"{name}.bias"]
        )

    def conv(name, x):
        weight = p[f"{name}.conv.weight"]
        return F.relu(norm(f"{name}.bn", F.conv2d(x, weight, padding=weight.shape[-1] // 2)))

    def double(name, x):
        return F.conv_transpose2d(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2)

    def to(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    first = double("neck.upsample_4x.3", F.gelu(norm("neck.upsample_4x.1", double("neck.upsample_4x.0", levels[0]))))
    second, third = double("neck.upsample_2x.0", levels[1]), levels[2]
    fourth = F.max_pool2d(levels[3], 2, stride=2)
    pooled = [fourth]
    for number, scale in enumerate((1, 2, 3, 6)):
        pooled.append(to(conv(f"decoder.psp_modules.{number}.1", F.adaptive_avg_pool2d(fourth, scale)), fourth))
    top = conv("decoder.bottleneck", torch.cat(pooled, 1))
    lateral = [conv(f"decoder.lateral_convs.{i}", x) for i, x in enumerate((first, second, third))]
    lateral[2] = lateral[2] + to(top, lateral[2])
    lateral[1] = lateral[1] + to(lateral[2], lateral[1])
    lateral[0] = lateral[0] + to(lateral[1], lateral[0])
    outputs = [conv(f"decoder.fpn_convs.{i}", x) for i, x in enumerate(lateral)] + [top]
    fused = conv("decoder.fpn_bottleneck", torch.cat([outputs[0], *(to(x, outputs[0]) for x in outputs[1:])], 1))
    main = F.conv2d(fused, p["decoder.conv_seg.weight"], p["decoder.conv_seg.bias"])
    auxiliary = conv("aux_head.convs.0", third)
    return main, F.conv2d(auxiliary, p["aux_head.conv_seg.weight"], p["aux_head.conv_seg.bias"])


def test_it_is_the_public_head(head, levels):
    main, auxiliary = by_hand(head.state_dict(), levels)
    assert main.shape == (2, CLASSES, 24, 28)
    expected = F.interpolate(main, size=(50, 51), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(levels, (50, 51)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.aux_head(levels[2]), auxiliary, atol=1e-5, rtol=1e-5)


def test_its_size_is_that_of_the_public_head():
    """Parameters of a base encoder's head, counted from the published sizes."""
    d, e, a, k = 768, 512, 256, 5
    neck = 2 * (d * d * 4 + d) + 2 * d + (d * d * 4 + d)
    uper = 4 * (d * e + 2 * e) + (d + 4 * e) * e * 9 + 2 * e
    uper += 3 * (d * e + 2 * e) + 3 * (e * e * 9 + 2 * e) + 4 * e * e * 9 + 2 * e + e * k + k
    fcn = d * a * 9 + 2 * a + a * k + k
    head = UPerNet((d,) * 4, k)
    assert sum(p.numel() for p in head.parameters()) == neck + uper + fcn
    assert [m.p for m in head.modules() if isinstance(m, KeyedDropout2d)] == [0.1, 0.1]


def test_initial_weights():
    head = UPerNet((64,) * 4, 5, channels=128, seed=3)
    state = torch.random.get_rng_state()
    again, other = UPerNet((64,) * 4, 5, channels=128, seed=3), UPerNet((64,) * 4, 5, channels=128, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, a), b, c in zip(head.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert (a.ndim == 1 and "bn" in name) or name.startswith("neck.upsample_4x.1") or not torch.equal(a, c), name
    weight = head.decoder.bottleneck.conv.weight.detach()  # He et al., fan out: 128 x 9
    assert float(weight.std()) == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    reference = nn.ConvTranspose2d(64, 64, 2, stride=2).requires_grad_(False)
    ours = head.neck.upsample_2x[0].weight.detach()
    assert float(ours.abs().max()) == pytest.approx(float(reference.weight.abs().max()), rel=0.02)
    assert float(ours.std()) == pytest.approx(float(reference.weight.std()), rel=0.05)
    assert float(head.decoder.conv_seg.weight.detach().abs().max()) == pytest.approx(128**-0.5, rel=0.05)


def test_any_number_of_levels():
    assert [pick_levels(n) for n in (1, 2, 3, 4, 5, 8)] == [
        (0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3), (1, 2, 3, 4), (1, 3, 5, 7),
    ]  # fmt: skip
    for count in (1, 2, 6):
        dims = tuple(range(4, 4 + count))
        levels = fields(1, *((2, dim, 4, 4) for dim in dims))
        assert UPerNet(dims, 2, 8).eval()(levels, (16, 16)).shape == (2, 2, 16, 16)
    with pytest.raises(InputError, match="built for 6 levels of features, got 5"):
        UPerNet(dims, 2, 8).eval()(levels[:5], (16, 16))
    with pytest.raises(InputError, match=r"a grid of \(1, 4\) tokens cannot be halved"):
        UPerNet((4,), 2, 8).eval()([torch.zeros(2, 4, 1, 4)], (16, 16))
    with pytest.raises(InputError, match="0 levels"):
        UPerNet((), 2, 8)


def test_all_is_trained_by_the_two_outputs(levels):
    head = UPerNet(DIMS, CLASSES, WIDTH, seed=1).train()
    main, auxiliary = head(levels, (12, 14))
    assert main.shape == auxiliary.shape == (2, CLASSES, 12, 14)
    (main.square().sum() + auxiliary.square().sum()).backward()
    still = {name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert still <= {"neck.upsample_4x.0.bias"}  # a batch norm takes it away, but for rounding


def test_dropout_is_of_channels_and_of_the_step():
    dropout = KeyedDropout2d(0.1, seed=3, name="x")
    ones = torch.ones(20, 200, 3, 2)
    state = torch.random.get_rng_state()
    masks = []
    for step in range(5):
        dropout.step = step
        masks.append(dropout(ones))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert masks[0].unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert torch.equal(masks[0].amin((2, 3)), masks[0].amax((2, 3)))  # whole channels
    assert float(torch.stack(masks).mean()) == pytest.approx(1, abs=0.02)
    dropout.step = 2
    assert torch.equal(dropout(ones), masks[2])
    assert not torch.equal(masks[2], masks[3])
    assert not torch.equal(KeyedDropout2d(0.1, seed=4, name="x")(ones), masks[0])
    assert torch.equal(dropout.eval()(ones), ones)


def encoder():
    model = create_model("copernicus_fm_small", embed_dim=32, depth=2, num_heads=4, image_size=64)
    return model.eval()


def test_lora_starts_as_the_encoder_trains_little_and_merges_exactly():
    model = encoder()
    sensor = SENSORS["s1_grd"]
    (x,) = fields(2, (2, 2, 32, 32))
    before, names = model.encode(x, sensor, normalize=False), list(model.state_dict())
    trained = add_lora(model, rank=3, seed=1)
    assert sum(p.numel() for p in trained) == 2 * (3 * (32 + 96) + 3 * (32 + 32))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert torch.equal(model.encode(x, sensor, normalize=False), before)
    x2, wanted = fields(3, (2, 2, 32, 32), (2, 32))
    start = [p.detach().clone() for p in trained]
    for _ in range(2):  # the first step moves B alone, for B = 0 hides A
        (model.encode(x2, sensor, normalize=False) * wanted).sum().backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    assert all(not torch.equal(a, b) for a, b in zip(trained, start, strict=True))
    adapted = model.encode(x, sensor, normalize=False)
    assert (adapted - before).abs().max() > 1e-3
    plain = encoder().state_dict()
    merge_lora(model)
    assert torch.equal(model.encode(x, sensor, normalize=False), adapted)
    assert set(model.state_dict()) == set(names)
    with torch.no_grad():
        added = {
            f"blocks.{block}.attn.{part}.weight": trained[at + 1] @ trained[at]
            for at, (block, part) in zip(
                range(0, 8, 2), [(0, "qkv"), (0, "proj"), (1, "qkv"), (1, "proj")], strict=True
            )
        }
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain[name] + added.get(name, 0), rtol=0, atol=1e-7)
    assert all(torch.linalg.matrix_rank(matrix, rtol=1e-6) <= 3 < min(matrix.shape) for matrix in added.values())


def test_lora_refuses():
    with pytest.raises(InputError, match="lora_rank is 0"):
        add_lora(encoder(), 0)
    with pytest.raises(InputError, match=r"Conv2d has none"):
        add_lora(nn.Conv2d(2, 2, 1), 2)
