"""The encoder against the public implementation's outputs (tests/goldens) and against properties it must have."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copernicus.datasets.sensors import SENSORS, InputError, Sensor
from copernicus.models.blocks import default_levels
from copernicus.models.fourier import fourier_expansion
from copernicus.models.language import LanguageTable
from copernicus.models.patch_embed import KERNEL_SCALE
from copernicus.models.position import resize_table, sincos_table
from copernicus.models.resize import kernel_resize_matrix, resize_kernel
from copernicus.models.vit import CopernicusFMViT, look

GOLDENS = Path(__file__).parent / "goldens"
sys.path.insert(0, str(GOLDENS))
from hashrand import small_weight  # noqa: E402

INDEX = json.loads((GOLDENS / "index.json").read_text())
KEYS = json.loads((GOLDENS / "keys_vit_base.json").read_text())
INPUTS = load_file(GOLDENS / "encoder_inputs.safetensors")
OUTPUTS = load_file(GOLDENS / "encoder_outputs.safetensors")
SEGMENTATION = load_file(GOLDENS / "seg_outputs.safetensors")
MISC = load_file(GOLDENS / "misc.safetensors")
MAE_INPUTS = load_file(GOLDENS / "mae_inputs.safetensors")
LANGUAGE = LanguageTable(
    {SENSORS[key.split("/")[1]].variable: v for key, v in MAE_INPUTS.items() if key.startswith("language/")}
)
LANGUAGE_NO2 = LanguageTable({SENSORS["s5p_no2"].variable: INPUTS["language/s5p_no2"]})
CASES = INDEX["encoder"]["definitions"]


@functools.cache
def golden_encoder(global_pool: bool = True, cartesian: bool = False, norm_eps: float = 1e-6) -> CopernicusFMViT:
    model = CopernicusFMViT(
        image_size=64,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=10,
        global_pool=global_pool,
        cartesian=cartesian,
        norm_eps=norm_eps,
        language=LANGUAGE_NO2,
    )
    state = {k: torch.from_numpy(small_weight(k, v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def golden_case(case: str, variant: str) -> tuple[torch.Tensor, torch.Tensor, Sensor, int]:
    definition = CASES[case]
    rows = [[math.nan if v == "nan" else v for v in row] for row in INDEX["encoder"]["meta"][variant]]
    metadata = torch.tensor([[math.nan if v is None else v for v in row] for row in rows])
    if variant == "full":
        metadata[:, 3] = definition["area_km2"]
    image = INPUTS[definition["input"]].float()
    return image, metadata, SENSORS[definition["table_or_language"]], definition["kernel_size"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def patch_tokens(
    model: CopernicusFMViT, image: torch.Tensor, sensor: Sensor, kernel: int | None = None
) -> torch.Tensor:
    view = look(image, sensor, None, kernel)
    return model.patch_tokens([view], model.kernels([view]))[0]


@pytest.mark.parametrize("name", INDEX["encoder"]["cases"])
@torch.inference_mode()
def test_outputs_equal_the_published_implementation(name):
    case, variant, options = name.split("/")
    pool, _, option = options.partition("_")
    model = golden_encoder(pool == "gp1", option == "cartesian", 1e-5 if option == "eps1e-5" else 1e-6)
    image, metadata, sensor, kernel = golden_case(case, variant)
    logits, features = model(image, metadata, sensor=sensor, patch_kernel=kernel)
    assert_close(features, OUTPUTS[f"{name}/features"], 1e-5)
    assert_close(logits, OUTPUTS[f"{name}/logits"], 1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_intermediates_and_patch_tokens_equal_the_published_implementation(case):
    model = golden_encoder()
    image, metadata, sensor, kernel = golden_case(case, "full")
    _, levels = model.forward_tokens(image, metadata, sensor=sensor, patch_kernel=kernel, levels=(0, 1))
    for i, level in enumerate(levels):
        assert_close(level, OUTPUTS[f"{case}/full/gp1/intermediate{i}"], 2e-5)
    assert_close(patch_tokens(model, image, sensor, kernel), OUTPUTS[f"{case}/patch_tokens"], 2e-5)
    (made,) = (model.patch_embed_spectral if sensor.spectral else model.patch_embed_variable)([sensor])
    assert_close(made.code_CK, OUTPUTS[f"{case}/hyper_waves"], 1e-5)
    assert_close(made.bias_D, OUTPUTS[f"{case}/hyper_bias"], 1e-5)
    assert_close(made.weight_CPD[0].unflatten(0, (16, 16))[:4, :4], OUTPUTS[f"{case}/hyper_weight_c0"], 1e-5)
    assert KERNEL_SCALE == 0.01


@pytest.mark.parametrize("name", [name for name in SEGMENTATION if name.split("/")[0] in CASES])
@torch.inference_mode()
def test_dense_features_equal_the_published_segmentation_encoder(name):
    case, variant, _, level = name.split("/")
    model = golden_encoder()
    image, metadata, sensor, _ = golden_case(case, variant)
    levels = model.encode_dense(image, sensor, metadata, normalize=False)
    assert_close(levels[int(level.removeprefix("level"))], SEGMENTATION[name], 2e-5)


@pytest.mark.parametrize("index", range(9))
def test_fourier_expansion_equals_the_published_one(index):
    settings = INDEX["misc"][f"fourier/{index}"]
    limits = (settings["lower"], settings["upper"])
    y = fourier_expansion(MISC[f"fourier/{index}/x"], limits, settings["d"], bounded=settings["assert_range"])
    assert_close(y, MISC[f"fourier/{index}/y"], 1e-6)


def test_fourier_expansion_clamps_below_its_range_and_refuses_above():
    tiny, lower = (fourier_expansion(torch.tensor(v), (1e-4, 720.0), 16) for v in (5e-5, 1e-4))
    assert_close(tiny, lower, 1e-6)
    with pytest.raises(InputError, match="721"):
        fourier_expansion(torch.tensor([721.0, 3.0]), (1e-4, 720.0), 16)
    assert torch.isfinite(fourier_expansion(torch.tensor(-12.0), (1e-4, 720.0), 16)).all()


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (14, 14), (32, 32), (48, 48), (64, 64), (8, 4)])
def test_kernel_resize_equals_the_published_one(size):
    name = f"{size[0]}x{size[1]}" if size[0] != size[1] else str(size[0])
    kernel_CPD = MISC["pi_resize/in"].flatten(2).permute(1, 2, 0)
    resized = resize_kernel(kernel_CPD, (16, 16), size).permute(2, 0, 1).unflatten(2, size)
    assert_close(resized, MISC[f"pi_resize/{name}"], 5e-5)


@pytest.mark.parametrize("side", [7, 12, 15, 20, 28])
def test_position_resize_equals_the_published_one(side):
    assert_close(resize_table(MISC["pos_resize/in"], (side, side)), MISC[f"pos_resize/{side}"], 1e-5)


def test_position_table_equals_the_published_one():
    assert_close(sincos_table(32, 4)[0], MISC["sincos/32_4"], 1e-6)
    assert_close(sincos_table(768, 14)[0, [0, 1, 15, 196]], MISC["sincos/768_14_rows0_1_15_196"], 1e-6)


@pytest.mark.parametrize("key", [k for k in KEYS if k.startswith("encoder_base ")])
def test_names_shapes_and_frozen_parameters_are_the_published_ones(key):
    options = dict(part.split("=") for part in key.split()[1:])
    model = CopernicusFMViT(num_classes=int(options["num_classes"]), global_pool=options["global_pool"] == "True")
    expected = {name: tuple(shape) for name, shape, _ in KEYS[key]["state_dict"]}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == KEYS[key]["frozen"]
    assert sum(p.numel() for p in model.parameters()) == KEYS[key]["n_parameters"]


@torch.inference_mode()
def test_a_batch_of_known_and_unknown_rows_equals_its_rows_alone():
    model = golden_encoder()
    sensor = SENSORS["s2_toa"]
    image = INPUTS["s2_64"].float()[[0, 1, 0, 1, 0]]
    known = torch.tensor([11.25, 48.125, 18262.0, 0.0256])
    metadata = known.repeat(5, 1)
    for row, unknown in enumerate([[], [0, 1], [2], [3], [0, 1, 2, 3]]):
        metadata[row, unknown] = math.nan
    together = model.forward_features(image, metadata, sensor=sensor)
    alone = [model.forward_features(image[i : i + 1], metadata[i : i + 1], sensor=sensor) for i in range(5)]
    assert_close(together, torch.cat(alone), 2e-6)
    # Each kind of knowledge tells: rows 0, 2, 4 hold the same image.
    assert min(float((together[a] - together[b]).abs().max()) for a, b in ((0, 2), (0, 4), (2, 4))) > 1e-3
    half_known = metadata[:1].clone()
    half_known[0, 1] = math.nan  # a longitude without a latitude is no place
    no_place = metadata[1:2]
    assert_close(
        model.forward_features(image[:1], half_known, sensor=sensor),
        model.forward_features(image[:1], no_place, sensor=sensor),
        0.0,
    )


@torch.inference_mode()
def test_no_metadata_is_unknown_metadata():
    model, image, sensor = golden_encoder(), INPUTS["s1_64"].float(), SENSORS["s1_grd"]
    unknown = torch.full((2, 4), math.nan)
    assert_close(model.encode(image, sensor), model.encode(image, sensor, unknown), 0.0)


@pytest.mark.parametrize(
    ("row", "field"), [([200.0, 95.0, 0, 0], "lat"), ([-190.0, 0, 0, 0], "lon"), ([0, 0, 0, 1e9], "area_km2")]
)
def test_impossible_metadata_is_named(row, field):
    metadata = torch.tensor([[0.0, 0, 0, 0], row])
    with pytest.raises(InputError, match=f"row 1: {field}"):
        golden_encoder().encode(INPUTS["s1_64"].float(), SENSORS["s1_grd"], metadata)


@torch.inference_mode()
def test_images_that_are_not_square_keep_their_tokens_places():
    """Far from the seam, the tokens of a wide image see what those of its square half see."""
    model = golden_encoder()
    sensor = SENSORS["s2_toa"]
    wide = torch.cat([INPUTS["s2_64"].float()] * 2, dim=3)
    tokens = patch_tokens(model, wide, sensor).unflatten(1, (4, 8))
    square = patch_tokens(model, wide[..., :64], sensor).unflatten(1, (4, 4))
    assert tokens.shape == (2, 4, 8, 32)
    assert_close(tokens[:, :, :4], square, 1e-6)
    levels = model.encode_dense(wide, sensor)
    assert [tuple(level.shape) for level in levels] == [(2, 32, 4, 8)] * 2
    assert model.encode(wide, sensor).shape == (2, 32)
    # Rows and columns of the position table are not mixed up.
    table = sincos_table(16, 4)
    tall, wide_table = resize_table(table, (8, 4)), resize_table(table, (4, 8))
    swapped = torch.cat([tall[..., 8:], tall[..., :8]], dim=-1)[:, 1:].unflatten(1, (8, 4)).transpose(1, 2)
    assert_close(wide_table[:, 1:].unflatten(1, (4, 8)), swapped, 1e-6)


@torch.inference_mode()
def test_the_first_token_sees_one_pixel_less_and_the_last_row_is_never_seen():
    model, sensor = golden_encoder(), SENSORS["s1_grd"]
    image = INPUTS["s1_64"].float()[:1]
    base = patch_tokens(model, image, sensor)
    changed = []
    for row in range(64):
        other = image.clone()
        other[:, :, row] += 1.0
        moved = (patch_tokens(model, other, sensor) - base).unflatten(1, (4, 4)).abs().amax(dim=(0, 2, 3)) > 1e-6
        changed.append(moved.nonzero().flatten().tolist())
    published = INDEX["encoder"]["verified"]["padding"]
    first, last = published["token0_pixel_rows"]
    assert [row for row in range(64) if changed[row] == [0]] == list(range(first, last + 1))
    assert [row for row in range(64) if not changed[row]] == published["unused_pixel_rows"]


TOKEN_COUNTS = {
    "s2_80_k16": ("s2_toa", 80, 16), "s2_70_k16": ("s2_toa", 70, 16), "no2_56_k4": ("s5p_no2", 56, 4),
    "no2_28_k2": ("s5p_no2", 28, 2), "dem_192_k64": ("dem", 192, 64), "rgb_64_k14": ("s1_grd", 64, 14),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKEN_COUNTS)
@torch.inference_mode()
def test_token_counts_are_the_published_ones(case):
    name, side, kernel = TOKEN_COUNTS[case]
    sensor = SENSORS[name]
    tokens = patch_tokens(golden_encoder(), torch.zeros(1, sensor.channels, side, side), sensor, kernel)
    assert tokens.shape[1] == INDEX["encoder"]["verified"]["token_counts"][case][1]


@torch.inference_mode()
def test_encode_normalises_unless_told_otherwise():
    model, sensor = golden_encoder(), SENSORS["s2_toa"]
    normalised = INPUTS["s2_64"].float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (sensor.mean, sensor.std))
    raw = normalised * std + mean
    assert_close(model.encode(raw, sensor), model.encode(normalised, sensor, normalize=False), 1e-4)
    assert (model.encode(raw, sensor) - model.encode(normalised, sensor)).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(2, 12, 64, 64), (13, 64, 64), (2, 13, 10, 64)])
def test_images_that_do_not_fit_the_sensor_are_refused(shape):
    with pytest.raises(InputError):
        golden_encoder().encode(torch.zeros(shape), SENSORS["s2_toa"])


def test_levels_are_the_published_ones():
    assert [default_levels(d) for d in (12, 24, 32)] == [(3, 5, 7, 11), (7, 11, 15, 23), (7, 15, 23, 31)]
    assert [default_levels(d) for d in (1, 2, 3, 4, 6)] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (1, 2, 3, 5)]


def test_a_name_without_an_embedding_gets_a_known_stand_in(tmp_path):
    table = LanguageTable({"Ozone": torch.ones(2048)})
    assert torch.equal(table.vector("Ozone"), torch.ones(2048))
    assert not table.stand_ins
    soil, rain = table.vector("soil moisture"), table.vector("rain")
    assert table.stand_ins == {"soil moisture", "rain"}
    assert torch.equal(soil, LanguageTable().vector("soil moisture"))
    assert abs(float(torch.nn.functional.cosine_similarity(soil, rain, dim=0))) < 0.1
    torch.save({"Ozone": torch.full((2048,), 2.0)}, tmp_path / "language.pt")
    assert torch.equal(LanguageTable.load(tmp_path / "language.pt").vector("Ozone"), torch.full((2048,), 2.0))
    with pytest.raises(InputError, match="2048"):
        LanguageTable({"Ozone": torch.ones(3)})
    with pytest.raises(InputError, match="no file"):
        LanguageTable.load(tmp_path / "absent.pt")


@torch.inference_mode()
def test_any_sensor_can_be_encoded():
    model = golden_encoder()
    hyperspectral = Sensor("prisma", wavelengths_nm=(500, 900, 1600), bandwidths_nm=(10, 10, 12), patch_kernel=8)
    soil = Sensor("soil", variable="soil moisture", patch_kernel=4)
    assert model.encode(torch.randn(1, 3, 32, 32), hyperspectral).shape == (1, 32)
    assert model.encode(torch.randn(1, 1, 28, 28), soil).shape == (1, 32)


def test_what_inference_caches_serves_training_after_it():
    kernel_resize_matrix.cache_clear()
    model = CopernicusFMViT(image_size=64, embed_dim=32, depth=1, num_heads=4)
    samples = {name: torch.randn(1, SENSORS[name].channels, 48, 48) for name in ("s3_olci", "s5p_o3")}
    with torch.inference_mode():
        for name, image in samples.items():
            model.encode(image, SENSORS[name])
    for name, image in samples.items():
        model.encode(image, SENSORS[name])[:, 0].sum().backward()
    assert float(model.patch_embed_variable.language_proj.weight.grad.norm()) > 0
