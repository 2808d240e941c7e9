"""What an experiment's values must be, checked before anything runs."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from copernicus.datasets.baseline import POLICIES
from copernicus.datasets.bench import SELECTABLE, TASKS, VARIANTS, get_task, select_tasks
from copernicus.datasets.miniature.tasks import TASKS as MINIATURE_TASKS
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models.blocks import check_sizes
from copernicus.models.language import LANGUAGE_SUFFIXES
from copernicus.models.sources import is_remote
from copernicus.models.zoo import ENCODERS, ZOO, check_encoder
from copernicus.platform.experiment import ExperimentError, unknown
from copernicus.platform.schema import (
    CLIMATE_INPUTS,
    CLIMATE_SPLITS,
    CLIMATE_SUFFIXES,
    FEWEST,
    MAP_FORMATS,
    PROTOCOLS,
    QUICK,
    SCALES,
    SECTIONS,
    STAGES,
    Climate,
    Embed,
    Encoder,
    Experiment,
    Model,
    Pretrain,
    Sweep,
)


@dataclass
class Check:
    """What may be said of a value at a path of the YAML; each raises `ExperimentError`.

    ``elsewhere``: another machine will run it. ``made``: folders that the experiment makes itself.
    """

    source: str
    elsewhere: bool
    made: list[Path] = field(default_factory=list)

    def wrong(self, path: str, message: str) -> ExperimentError:
        return ExperimentError(f"{self.source}: {path}: {message}")

    def choice(self, path: str, value: str, valid: Sequence[str]) -> None:
        if value not in valid and not (self.elsewhere and unknown(value)):
            close = difflib.get_close_matches(value, valid, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise self.wrong(path, f"no {value!r}; {hint}valid choices: {', '.join(valid)}")

    def positive(self, path: str, value: float | None, zero: bool = False) -> None:
        if value is not None and not (value > 0 or (zero and value == 0)):
            raise self.wrong(path, f"must be {'at least 0' if zero else 'positive'}, it is {value}")

    def fraction(self, path: str, value: float) -> None:
        if not 0 <= value < 1:
            raise self.wrong(path, f"must be at least 0 and below 1, it is {value}")

    def multiple(self, path: str, size: int, kernel: int) -> None:
        if size <= 0 or size % kernel:
            raise self.wrong(path, f"must be a positive multiple of the patch kernel {kernel}, it is {size}")

    def plain(self, path: str, value: str) -> None:
        """Names become those of folders, MLflow metrics and columns of tables."""
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}", value):
            raise self.wrong(
                path,
                f"use letters, digits, '.', '_' and '-' only, 80 at most, and no '.' in front; it is {value[:100]!r}",
            )

    def exists(self, path: str, value: str) -> None:
        here = Path(value).absolute()
        if not self.elsewhere and not any(here == m or m in here.parents for m in self.made) and not here.exists():
            raise self.wrong(path, f"no such file or folder: {value}")

    def language(self, path: str, value: str | None) -> None:
        if value is None:
            return
        if not value.endswith(LANGUAGE_SUFFIXES) and not (self.elsewhere and unknown(value)):
            raise self.wrong(path, f"{value!r} does not end in {', '.join(LANGUAGE_SUFFIXES)}")
        if not is_remote(value):
            self.exists(path, value)

    def model(self, path: str, value: Model, names: tuple[str, ...]) -> None:
        if ":" not in value.name or names is not ENCODERS:
            self.choice(f"{path}.name", value.name, names)
        for key, number in value.overrides().items():
            self.positive(f"{path}.{key}", number)
        if value.name in ZOO:
            shape = {**ZOO[value.name][1], **value.overrides()}
            try:
                check_sizes(shape["embed_dim"], shape["num_heads"], shape["depth"])
                if names is not ENCODERS:  # pretrained with a decoder, of the published sizes if the YAML says nothing
                    decoder = {"embed_dim": 512, "num_heads": 16, "depth": 8}
                    decoder |= {k: v for k in decoder if (v := getattr(value, f"decoder_{k}")) is not None}
                    check_sizes(decoder["embed_dim"], decoder["num_heads"], decoder["depth"], "decoder_")
            except InputError as error:
                raise self.wrong(path, str(error)) from None


def validate(e: Experiment, source: str, elsewhere: bool = False) -> None:
    """What the types of the schema do not say: choices, ranges, files that must be there, sizes that must fit.

    ``elsewhere``: another machine will run it; what only that can know (its files, packages, variables) is left to it.

    Raises:
        ExperimentError: the first thing that is wrong, with its path.
    """

    check = Check(source, elsewhere)
    check.choice("kind", e.kind, tuple(SECTIONS))
    check.plain("name", e.name)
    if e.seed < 0:
        raise check.wrong("seed", f"must be at least 0, it is {e.seed}")
    for section in SECTIONS.get(e.kind, ()):
        if getattr(e, section) is None:
            raise check.wrong(section, f"missing: an experiment of kind {e.kind} needs this section")
    if e.kind == "pipeline" and all(getattr(e, stage) is None for stage in STAGES):
        raise check.wrong("kind", f"a pipeline needs at least one of the sections {', '.join(STAGES)}")

    for i, item in enumerate(e.sweep.tasks if e.sweep else ()):  # first: a miniature's tasks are often these
        check.choice(f"sweep.tasks[{i}]", item, SELECTABLE)
    if e.miniature:
        check.choice("miniature.scale", e.miniature.scale, SCALES)
        check.positive("miniature.grids", e.miniature.grids)
        check.made = [Path(e.miniature.out).absolute()]
        try:
            written = {task for name in e.miniature.task_names() for task in MINIATURE_TASKS[name].tasks}
        except InputError as error:
            raise check.wrong("miniature.tasks", str(error)) from None
        if e.sweep and check.made[0] in Path(e.sweep.data).absolute().parents:
            for swept in select_tasks([item for item in e.sweep.tasks if item in SELECTABLE]):
                if swept.partition("-")[0] not in written:
                    raise check.wrong(
                        "miniature.tasks", f"lacks {swept}, which sweep.tasks looks for in {e.sweep.data}"
                    )
    if e.pretrain is not None:
        _pretrain(check, e.pretrain)
    if e.sweep is not None:
        _sweep(check, e, e.sweep)
    if e.embed is not None and e.kind in ("embed", "pipeline"):
        _embed(check, e, e.embed)
    if e.climate is not None and e.kind in ("climate", "pipeline"):
        _climate(check, e, e.climate)


def _images(check: Check, at: str, p: Pretrain | Embed) -> None:
    """Where images come from, of which sensors, how large."""
    if not p.shards and not p.geotiffs:
        raise check.wrong(f"{at}.shards", "give shard files, folders or brace patterns, or else geotiffs")
    if p.shards and p.geotiffs:
        raise check.wrong(f"{at}.geotiffs", "shards are given too; for these images alone say shards: []")
    if p.geotiffs:
        check.exists(f"{at}.geotiffs", p.geotiffs)
        if not check.elsewhere and not any(Path(p.geotiffs).glob("fnames*.json.gz")):
            raise check.wrong(
                f"{at}.geotiffs", f"{p.geotiffs} holds no fnames*.json.gz, which lists a raw layout's images"
            )
        if p.index:
            raise check.wrong(f"{at}.index", "is of shards; geotiffs need none")
    elif p.s2_offset != "auto":
        raise check.wrong(f"{at}.s2_offset", "is of raw images (geotiffs); shards are taken as they are")
    if p.index and not check.elsewhere and Path(p.index).exists():
        with open(p.index, "rb") as file:
            if file.read(4) != b"PAR1":
                raise check.wrong(f"{at}.index", f"{p.index} is not an index; make it with `copernicus data index`")
    check.choice(f"{at}.s2_offset", p.s2_offset, POLICIES)
    for shards in p.shards:
        if "://" in shards:
            continue  # found out when it is listed
        literal = shards.split("{")[0].split("*")[0]
        check.exists(f"{at}.shards", shards if literal == shards else str(Path(literal + "x").parent))
    if not p.sensors:
        raise check.wrong(f"{at}.sensors", f"empty; valid choices: {', '.join(SENSORS)}")
    for i, sensor in enumerate(p.sensors):
        check.choice(f"{at}.sensors[{i}]", sensor, tuple(SENSORS))
    if len(set(p.sensors)) < len(p.sensors):
        raise check.wrong(f"{at}.sensors", f"has one twice: {', '.join(p.sensors)}")
    for sensor, size in p.image_size.items():
        check.choice(f"{at}.image_size.{sensor}", sensor, tuple(SENSORS))
        check.multiple(f"{at}.image_size.{sensor}", size, SENSORS[sensor].patch_kernel)


def _pretrain(check: Check, p: Pretrain) -> None:
    _images(check, "pretrain", p)
    check.choice("pretrain.preset", p.preset, ("default", "published"))
    check.choice("pretrain.require", p.require, ("any", "all"))
    check.choice("pretrain.parallel", p.parallel, ("ddp", "fsdp"))
    check.choice("pretrain.precision", p.precision, ("auto", "float32", "bf16"))
    check.model("pretrain.model", p.model, tuple(name for name in ENCODERS if f"{name}_mae" in ZOO))
    check.language("pretrain.language", p.language)
    for key in ("epochs", "draws_per_grid", "batch_size", "blr", "micro_batch_size", "cpus_per_worker", "data_cpus", "val_every",
                "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "clip_grad_norm", "hang_minutes"):  # fmt: skip
        check.positive(f"pretrain.{key}", getattr(p, key))
    for key in ("warmup_epochs", "weight_decay", "gpus_per_worker", "min_lr", "max_failures"):
        check.positive(f"pretrain.{key}", getattr(p, key), zero=True)
    if p.mask_ratio == 0:
        raise check.wrong("pretrain.mask_ratio", "0 hides nothing; it lies between 0 and 1")
    for key in ("mask_ratio", "metadata_drop", "val_fraction"):
        check.fraction(f"pretrain.{key}", getattr(p, key))
    if not 0 <= p.max_skipped <= 1:
        raise check.wrong("pretrain.max_skipped", f"must be a share between 0 and 1, it is {p.max_skipped}")
    given = p.workers if isinstance(p.workers, list) else [p.workers]
    if (
        not all(type(n) is int and n > 0 for n in given)
        or given != sorted(given)
        or (isinstance(p.workers, list) and len(given) != 2)
    ):
        raise check.wrong("pretrain.workers", f"must be a number above 0 or two, [fewest, most]; it is {p.workers}")
    if given[-1] > p.batch_size:
        raise check.wrong("pretrain.workers", f"{given[-1]} workers cannot share a global batch of {p.batch_size}")
    if len(p.betas) != 2 or not all(0 <= b < 1 for b in p.betas):
        raise check.wrong("pretrain.betas", f"must be two numbers from 0 to 1, it is {p.betas}")
    low_high = p.channel_fraction
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
        raise check.wrong(
            "pretrain.channel_fraction", f"must be [low, high] with 0 < low <= high <= 1, it is {low_high}"
        )
    if (d := p.distill) is not None:
        if not d.teacher:
            raise check.wrong("pretrain.distill.teacher", "missing: give a folder, or hf://facebook/dinov2-base")
        if not d.teacher.startswith("hf://"):
            check.exists("pretrain.distill.teacher", d.teacher)
        check.positive("pretrain.distill.weight", d.weight)
        if d.cache is not None and "://" in d.cache:
            raise check.wrong("pretrain.distill.cache", f"must be a folder of a file system, it is {d.cache}")
        if "s2_toa" not in p.sensors:
            raise check.wrong(
                "pretrain.distill", "the teacher sees red, green and blue of s2_toa: add it to pretrain.sensors"
            )
        if not check.elsewhere and importlib.util.find_spec("transformers") is None:
            raise check.wrong("pretrain.distill", "needs transformers: pip install 'copernicus-platform[distill]'")


def _weights(check: Check, e: Experiment, here: str, encoder: Encoder, chosen: Model) -> None:
    if encoder.weights == "pretrain":
        if e.pretrain is None or e.kind not in ("pretrain", "pipeline"):
            raise check.wrong(f"{here}.weights", "this experiment pretrains nothing; give a file, hf://... or none")
        pretrained = (e.pretrain.model.name, e.pretrain.model.encoder_overrides())
        if (chosen.name, chosen.encoder_overrides()) != pretrained:
            raise check.wrong(
                f"{here}.model", f"this experiment pretrains {pretrained[0]} {pretrained[1]}; leave model out"
            )
    elif encoder.weights != "none" and not is_remote(encoder.weights):
        check.exists(f"{here}.weights", encoder.weights)


def _sweep(check: Check, e: Experiment, s: Sweep) -> None:
    if not s.data:
        raise check.wrong("sweep.data", "missing: give the folder that holds the benchmark's task folders")
    check.exists("sweep.data", s.data)
    if not s.tasks:
        raise check.wrong("sweep.tasks", f"empty; valid choices: {', '.join(SELECTABLE)}")
    tasks = [get_task(name) for name in select_tasks([item for item in s.tasks if item in SELECTABLE])]
    for name, size in s.image_size.items():
        check.choice(f"sweep.image_size.{name}", name, (*TASKS, *VARIANTS))
        check.multiple(f"sweep.image_size.{name}", size, get_task(name).sensor.patch_kernel)
    check.choice("sweep.protocol", s.protocol, PROTOCOLS)
    if not s.encoders:
        raise check.wrong("sweep.encoders", "empty: name at least one encoder, as in {random: {weights: none}}")
    keys: set[str] = set()
    for name, encoder in s.encoders.items():
        here = f"sweep.encoders.{name}"
        check.plain(here, name)
        if encoder.model is not None:
            check.model(f"{here}.model", encoder.model, ENCODERS)
        elif e.pretrain is None:
            raise check.wrong(f"{here}.model", "missing: this experiment pretrains no model to take")
        chosen = encoder.model or e.pretrain.model  # type: ignore[union-attr]
        arguments = {**chosen.encoder_overrides(), **({"language": ""} if encoder.language else {})}
        for task in tasks:
            if check.elsewhere and chosen.name not in ZOO:
                break  # an encoder of the user's own, to be found where it runs
            try:
                check_encoder(chosen.name, task.sensor, **arguments)
            except InputError as error:
                raise check.wrong(here, f"task {task.name}: {error}") from None
        protocol = encoder.protocol or s.protocol
        check.choice(f"{here}.protocol", protocol, PROTOCOLS)
        dense = [task.name for task in tasks if task.dense]
        if protocol in QUICK and dense:
            raise check.wrong(
                f"{here}.protocol",
                f"{protocol} is for image-level tasks; {', '.join(dense)}: a target for each pixel",
            )
        if clash := [task.name for task in tasks if f"{task.name}-{name}" in keys]:
            raise check.wrong(here, f"with task {clash[0]} its name reads like another cell's; choose another name")
        keys |= {f"{task.name}-{name}" for task in tasks}
        for key in ("blocks", "lora_rank"):
            check.positive(f"{here}.{key}", getattr(encoder, key))
            if getattr(encoder, key) is not None and protocol != "finetune":
                raise check.wrong(f"{here}.{key}", f"is of the protocol finetune, not of {protocol}")
        if encoder.blocks is not None and encoder.lora_rank is not None:
            raise check.wrong(here, "blocks and lora_rank are both given; choose one")
        depth = ZOO[chosen.name][1].get("depth") if chosen.name in ZOO else None
        depth = chosen.depth or depth
        if encoder.blocks is not None and depth is not None and encoder.blocks > depth:
            raise check.wrong(f"{here}.blocks", f"is {encoder.blocks}, the model has {depth}")
        if not encoder.weights:
            raise check.wrong(f"{here}.weights", "empty; give none, pretrain, a file or hf://...")
        if protocol == "scratch" and encoder.weights != "none":
            raise check.wrong(
                f"{here}.weights", "scratch trains from random weights: leave weights out, or say finetune"
            )
        check.language(f"{here}.language", encoder.language)
        if encoder.seed < 0:
            raise check.wrong(f"{here}.seed", f"must be at least 0, it is {encoder.seed}")
        _weights(check, e, here, encoder, chosen)
    for name, space in s.search.items():
        here = f"sweep.search.{name}"
        check.choice(here, name, ("lr", "weight_decay", "batch_size", "epochs"))
        if name in ("batch_size", "epochs") and not space.values:
            raise check.wrong(here, "a whole number: give values, as in values: [16, 32]")
        ranged = space.low is not None and space.high is not None
        if ranged == bool(space.values):
            raise check.wrong(here, "give either low and high, or values")
        if ranged and not (space.low < space.high and (space.low > 0 or not space.log)):  # type: ignore[operator]
            raise check.wrong(here, f"needs low < high (and low > 0 when log), it is {space.low} to {space.high}")
        least = 0.0 if name == "weight_decay" else 1 if name in ("batch_size", "epochs") else 1e-300
        for value in [*(space.values or []), *(v for v in (space.low, space.high) if v is not None)]:
            if not math.isfinite(value) or value < least:
                raise check.wrong(
                    here, f"must be finite and {'at least 0' if not least else 'above 0'}, it has {value}"
                )
            if name in ("batch_size", "epochs") and value != int(value):
                raise check.wrong(here, f"must be whole numbers, it has {value}")
        if space.values and (space.low is not None or space.high is not None):
            raise check.wrong(here, "give either low and high, or values")
        if len(set(space.values or [])) < len(space.values or []):
            raise check.wrong(here, f"has a value twice: {space.values}")
    if any(
        size < 2
        for size in [
            s.batch_size or 2,
            *((s.search["batch_size"].values or []) if "batch_size" in s.search else []),
        ]
    ):
        raise check.wrong("sweep.batch_size", "must be at least 2 (batch normalisation)")
    check.choice("sweep.searcher", s.searcher, ("optuna", "random", "grid"))
    if s.searcher == "grid" and any(not space.values for space in s.search.values()):
        raise check.wrong("sweep.searcher", "grid needs values (not low and high) for everything it searches")
    check.choice("sweep.preset", s.preset, ("default", "published"))
    check.choice("sweep.scheduler", s.scheduler, ("none", "asha"))
    check.choice("sweep.head", s.head, ("upernet", "light"))
    check.choice("sweep.precision", s.precision, ("float32", "bf16"))
    check.choice("sweep.features", s.features, ("auto", "cached", "live"))
    for key in ("trials", "seeds", "epochs", "batch_size", "cpus_per_trial", "cache_gb", "max_concurrent"):
        check.positive(f"sweep.{key}", getattr(s, key))
    check.positive("sweep.gpus_per_trial", s.gpus_per_trial, zero=True)


def _embed(check: Check, e: Experiment, m: Embed) -> None:
    _images(check, "embed", m)
    here = "embed.encoder"
    if m.encoder.model is not None:
        check.model(f"{here}.model", m.encoder.model, ENCODERS)
    elif e.pretrain is None:
        raise check.wrong(f"{here}.model", "missing: this experiment pretrains no model to take")
    chosen = m.encoder.model or e.pretrain.model  # type: ignore[union-attr]
    for key in ("protocol", "blocks", "lora_rank"):
        if getattr(m.encoder, key) is not None:
            raise check.wrong(f"{here}.{key}", "is of a sweep's encoders; embeddings are of a frozen one")
    arguments = {**chosen.encoder_overrides(), **({"language": ""} if m.encoder.language else {})}
    for name in m.sensors:
        if check.elsewhere and chosen.name not in ZOO:
            break
        try:
            kind = check_encoder(chosen.name, SENSORS[name], **arguments)
        except InputError as error:
            raise check.wrong(here, f"{name}: {error}") from None
        if len(m.sensors) > 1 and "sensor" in inspect.signature(kind).parameters:
            raise check.wrong("embed.sensors", f"{chosen.name} is built for one sensor: name one, not {len(m.sensors)}")
    if not m.encoder.weights:
        raise check.wrong(f"{here}.weights", "empty; give none, pretrain, a file or hf://...")
    if m.encoder.seed < 0:
        raise check.wrong(f"{here}.seed", f"must be at least 0, it is {m.encoder.seed}")
    check.language(f"{here}.language", m.encoder.language)
    _weights(check, e, here, m.encoder, chosen)
    check.choice("embed.precision", m.precision, ("float32", "bf16"))
    if "zarr" in m.formats and not check.elsewhere and importlib.util.find_spec("zarr") is None:
        raise check.wrong("embed.formats", "zarr needs Python 3.11 or newer; leave it out, as in [npz, pt]")
    if len(set(m.formats)) < len(m.formats):
        raise check.wrong("embed.formats", f"has one twice: {m.formats}")
    for i, name in enumerate(m.formats):
        check.choice(f"embed.formats[{i}]", name, MAP_FORMATS)
    for key in ("batch_size", "grids_per_chunk", "cpus_per_worker"):
        check.positive(f"embed.{key}", getattr(m, key))
    for key in ("workers", "gpus_per_worker"):
        check.positive(f"embed.{key}", getattr(m, key), zero=True)
    if not 0 <= m.max_skipped <= 1:
        raise check.wrong("embed.max_skipped", f"must be a share between 0 and 1, it is {m.max_skipped}")


def _climate(check: Check, e: Experiment, c: Climate) -> None:
    if not c.targets:
        raise check.wrong("climate.targets", "missing: give a NetCDF or parquet file with values on a 0.25-degree grid")
    if not check.elsewhere or not unknown(c.targets):
        check.choice("climate.targets", Path(c.targets).suffix, CLIMATE_SUFFIXES)
    check.exists("climate.targets", c.targets)
    needs = [name for name in c.inputs if name in ("embeddings", "both")]
    for key, given, valid in (("inputs", c.inputs, CLIMATE_INPUTS), ("splits", c.splits, CLIMATE_SPLITS)):
        if not given:
            raise check.wrong(f"climate.{key}", f"empty; valid choices: {', '.join(valid)}")
        for i, name in enumerate(given):
            check.choice(f"climate.{key}[{i}]", name, valid)
        if len(set(given)) < len(given):
            raise check.wrong(f"climate.{key}", f"has one twice: {given}")
    if c.embeddings is not None:
        check.exists("climate.embeddings", c.embeddings)
    elif needs and (e.embed is None or e.kind == "climate"):
        raise check.wrong(
            "climate.embeddings",
            f"missing: this experiment embeds nothing; give the folder of one that did, or leave {' and '.join(needs)} out of "
            "climate.inputs",
        )
    if c.variables is not None and not c.variables:
        raise check.wrong("climate.variables", "empty: name some, or leave it out for all of them")
    if c.cells is not None and c.cells < FEWEST:
        raise check.wrong("climate.cells", f"must be at least {FEWEST}, it is {c.cells}")
    if not 1 <= c.block_degrees <= 60:
        raise check.wrong("climate.block_degrees", f"must lie between 1 and 60, it is {c.block_degrees}")
