"""What an experiment's values must be, checked before anything runs."""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path

from copernicus.datasets.baseline import POLICIES
from copernicus.datasets.bench import SELECTABLE, TASKS, VARIANTS, get_task, select_tasks
from copernicus.datasets.miniature.tasks import TASKS as MINIATURE_TASKS
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models.blocks import check_sizes
from copernicus.models.language import LANGUAGE_SUFFIXES
from copernicus.models.sources import is_remote
from copernicus.models.zoo import ENCODERS, ZOO, check_encoder
from copernicus.platform.experiment import (
    PROTOCOLS,
    QUICK,
    SCALES,
    SECTIONS,
    Experiment,
    ExperimentError,
    Model,
    unknown,
)


def validate(e: Experiment, source: str, elsewhere: bool = False) -> None:
    """What the types of the schema do not say: choices, ranges, files that must be there, sizes that must fit.

    ``elsewhere``: another machine will run it; what only that can know (its files, packages, variables) is left to it.

    Raises:
        ExperimentError: the first thing that is wrong, with its path.
    """

    def wrong(path: str, message: str) -> ExperimentError:
        return ExperimentError(f"{source}: {path}: {message}")

    def choice(path: str, value: str, valid: Sequence[str]) -> None:
        if value not in valid and not (elsewhere and unknown(value)):
            close = difflib.get_close_matches(value, valid, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise wrong(path, f"no {value!r}; {hint}valid choices: {', '.join(valid)}")

    def positive(path: str, value: float | None, zero: bool = False) -> None:
        if value is not None and not (value > 0 or (zero and value == 0)):
            raise wrong(path, f"must be {'at least 0' if zero else 'positive'}, it is {value}")

    def fraction(path: str, value: float) -> None:
        if not 0 <= value < 1:
            raise wrong(path, f"must be at least 0 and below 1, it is {value}")

    def multiple(path: str, size: int, kernel: int) -> None:
        if size <= 0 or size % kernel:
            raise wrong(path, f"must be a positive multiple of the patch kernel {kernel}, it is {size}")

    choice("kind", e.kind, tuple(SECTIONS))

    def plain(path: str, value: str) -> None:
        """Names become those of folders, MLflow metrics and columns of tables."""
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}", value):
            raise wrong(
                path,
                f"use letters, digits, '.', '_' and '-' only, 80 at most, and no '.' in front; it is {value[:100]!r}",
            )

    plain("name", e.name)
    if e.seed < 0:
        raise wrong("seed", f"must be at least 0, it is {e.seed}")
    sections = {"pretrain": e.pretrain, "sweep": e.sweep}
    for section in SECTIONS.get(e.kind, ()):
        if sections[section] is None:
            raise wrong(section, f"missing: an experiment of kind {e.kind} needs this section")
    if e.kind == "pipeline" and e.pretrain is None and e.sweep is None:
        raise wrong("kind", "a pipeline needs at least one of the sections pretrain, sweep")

    made: list[Path] = []
    for i, item in enumerate(e.sweep.tasks if e.sweep else ()):  # first: a miniature's tasks are often these
        choice(f"sweep.tasks[{i}]", item, SELECTABLE)
    if e.miniature:
        choice("miniature.scale", e.miniature.scale, SCALES)
        positive("miniature.grids", e.miniature.grids)
        made = [Path(e.miniature.out).absolute()]
        try:
            written = {task for name in e.miniature.task_names() for task in MINIATURE_TASKS[name].tasks}
        except InputError as error:
            raise wrong("miniature.tasks", str(error)) from None
        if e.sweep and made[0] in Path(e.sweep.data).absolute().parents:
            for swept in select_tasks([item for item in e.sweep.tasks if item in SELECTABLE]):
                if swept.partition("-")[0] not in written:
                    raise wrong("miniature.tasks", f"lacks {swept}, which sweep.tasks looks for in {e.sweep.data}")

    def exists(path: str, value: str) -> None:
        here = Path(value).absolute()
        if not elsewhere and not any(here == m or m in here.parents for m in made) and not here.exists():
            raise wrong(path, f"no such file or folder: {value}")

    def language(path: str, value: str | None) -> None:
        if value is None:
            return
        if not value.endswith(LANGUAGE_SUFFIXES) and not (elsewhere and unknown(value)):
            raise wrong(path, f"{value!r} does not end in {', '.join(LANGUAGE_SUFFIXES)}")
        if not is_remote(value):
            exists(path, value)

    def model(path: str, value: Model, names: tuple[str, ...]) -> None:
        if ":" not in value.name or names is not ENCODERS:
            choice(f"{path}.name", value.name, names)
        for key, number in value.overrides().items():
            positive(f"{path}.{key}", number)
        if value.name in ZOO:
            shape = {**ZOO[value.name][1], **value.overrides()}
            try:
                check_sizes(shape["embed_dim"], shape["num_heads"], shape["depth"])
                if names is not ENCODERS:  # pretrained with a decoder, of the published sizes if the YAML says nothing
                    decoder = {"embed_dim": 512, "num_heads": 16, "depth": 8}
                    decoder |= {k: v for k in decoder if (v := getattr(value, f"decoder_{k}")) is not None}
                    check_sizes(decoder["embed_dim"], decoder["num_heads"], decoder["depth"], "decoder_")
            except InputError as error:
                raise wrong(path, str(error)) from None

    if (p := e.pretrain) is not None:
        if not p.shards and not p.geotiffs:
            raise wrong("pretrain.shards", "give shard files, folders or brace patterns, or else pretrain.geotiffs")
        if p.shards and p.geotiffs:
            raise wrong("pretrain.geotiffs", "shards are given too; for these images alone say pretrain.shards=[]")
        if p.geotiffs:
            exists("pretrain.geotiffs", p.geotiffs)
            if not elsewhere and not any(Path(p.geotiffs).glob("fnames*.json.gz")):
                raise wrong(
                    "pretrain.geotiffs", f"{p.geotiffs} holds no fnames*.json.gz, which lists a raw layout's images"
                )
            if p.index:
                raise wrong("pretrain.index", "is of shards; pretrain.geotiffs needs none")
        elif p.s2_offset != "auto":
            raise wrong("pretrain.s2_offset", "is of raw images (pretrain.geotiffs); shards are taken as they are")
        if p.index and not elsewhere and Path(p.index).exists():
            with open(p.index, "rb") as file:
                if file.read(4) != b"PAR1":
                    raise wrong("pretrain.index", f"{p.index} is not an index; make it with `copernicus data index`")
        choice("pretrain.s2_offset", p.s2_offset, POLICIES)
        choice("pretrain.preset", p.preset, ("default", "published"))
        choice("pretrain.require", p.require, ("any", "all"))
        choice("pretrain.parallel", p.parallel, ("ddp", "fsdp"))
        choice("pretrain.precision", p.precision, ("auto", "float32", "bf16"))
        for shards in p.shards:
            if "://" in shards:
                continue  # found out when it is listed
            literal = shards.split("{")[0].split("*")[0]
            exists("pretrain.shards", shards if literal == shards else str(Path(literal + "x").parent))
        model("pretrain.model", p.model, tuple(name for name in ENCODERS if f"{name}_mae" in ZOO))
        language("pretrain.language", p.language)
        if not p.sensors:
            raise wrong("pretrain.sensors", f"empty; valid choices: {', '.join(SENSORS)}")
        for i, sensor in enumerate(p.sensors):
            choice(f"pretrain.sensors[{i}]", sensor, tuple(SENSORS))
        for sensor, size in p.image_size.items():
            choice(f"pretrain.image_size.{sensor}", sensor, tuple(SENSORS))
            multiple(f"pretrain.image_size.{sensor}", size, SENSORS[sensor].patch_kernel)
        for key in ("epochs", "draws_per_grid", "batch_size", "blr", "micro_batch_size", "cpus_per_worker", "data_cpus", "val_every",
                    "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "clip_grad_norm", "hang_minutes"):  # fmt: skip
            positive(f"pretrain.{key}", getattr(p, key))
        for key in ("warmup_epochs", "weight_decay", "gpus_per_worker", "min_lr", "max_failures"):
            positive(f"pretrain.{key}", getattr(p, key), zero=True)
        if p.mask_ratio == 0:
            raise wrong("pretrain.mask_ratio", "0 hides nothing; it lies between 0 and 1")
        for key in ("mask_ratio", "metadata_drop", "val_fraction"):
            fraction(f"pretrain.{key}", getattr(p, key))
        if not 0 <= p.max_skipped <= 1:
            raise wrong("pretrain.max_skipped", f"must be a share between 0 and 1, it is {p.max_skipped}")
        given = p.workers if isinstance(p.workers, list) else [p.workers]
        if (
            not all(type(n) is int and n > 0 for n in given)
            or given != sorted(given)
            or (isinstance(p.workers, list) and len(given) != 2)
        ):
            raise wrong("pretrain.workers", f"must be a number above 0 or two, [fewest, most]; it is {p.workers}")
        if given[-1] > p.batch_size:
            raise wrong("pretrain.workers", f"{given[-1]} workers cannot share a global batch of {p.batch_size}")
        if len(p.betas) != 2 or not all(0 <= b < 1 for b in p.betas):
            raise wrong("pretrain.betas", f"must be two numbers from 0 to 1, it is {p.betas}")
        low_high = p.channel_fraction
        if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
            raise wrong("pretrain.channel_fraction", f"must be [low, high] with 0 < low <= high <= 1, it is {low_high}")
        if (d := p.distill) is not None:
            if not d.teacher:
                raise wrong("pretrain.distill.teacher", "missing: give a folder, or hf://facebook/dinov2-base")
            if not d.teacher.startswith("hf://"):
                exists("pretrain.distill.teacher", d.teacher)
            positive("pretrain.distill.weight", d.weight)
            if d.cache is not None and "://" in d.cache:
                raise wrong("pretrain.distill.cache", f"must be a folder of a file system, it is {d.cache}")
            if "s2_toa" not in p.sensors:
                raise wrong(
                    "pretrain.distill", "the teacher sees red, green and blue of s2_toa: add it to pretrain.sensors"
                )
            if not elsewhere and importlib.util.find_spec("transformers") is None:
                raise wrong("pretrain.distill", "needs transformers: pip install 'copernicus-platform[distill]'")

    if (s := e.sweep) is not None:
        if not s.data:
            raise wrong("sweep.data", "missing: give the folder that holds the benchmark's task folders")
        exists("sweep.data", s.data)
        if not s.tasks:
            raise wrong("sweep.tasks", f"empty; valid choices: {', '.join(SELECTABLE)}")
        tasks = [get_task(name) for name in select_tasks([item for item in s.tasks if item in SELECTABLE])]
        for name, size in s.image_size.items():
            choice(f"sweep.image_size.{name}", name, (*TASKS, *VARIANTS))
            multiple(f"sweep.image_size.{name}", size, get_task(name).sensor.patch_kernel)
        choice("sweep.protocol", s.protocol, PROTOCOLS)
        if not s.encoders:
            raise wrong("sweep.encoders", "empty: name at least one encoder, as in {random: {weights: none}}")
        keys: set[str] = set()
        for name, encoder in s.encoders.items():
            here = f"sweep.encoders.{name}"
            plain(here, name)
            if encoder.model is not None:
                model(f"{here}.model", encoder.model, ENCODERS)
            elif e.pretrain is None:
                raise wrong(f"{here}.model", "missing: this experiment pretrains no model to take")
            chosen = encoder.model or e.pretrain.model  # type: ignore[union-attr]
            arguments = {**chosen.encoder_overrides(), **({"language": ""} if encoder.language else {})}
            for task in tasks:
                if elsewhere and chosen.name not in ZOO:
                    break  # an encoder of the user's own, to be found where it runs
                try:
                    check_encoder(chosen.name, task.sensor, **arguments)
                except InputError as error:
                    raise wrong(here, f"task {task.name}: {error}") from None
            protocol = encoder.protocol or s.protocol
            choice(f"{here}.protocol", protocol, PROTOCOLS)
            dense = [task.name for task in tasks if task.dense]
            if protocol in QUICK and dense:
                raise wrong(
                    f"{here}.protocol",
                    f"{protocol} is for image-level tasks; {', '.join(dense)}: a target for each pixel",
                )
            if clash := [task.name for task in tasks if f"{task.name}-{name}" in keys]:
                raise wrong(here, f"with task {clash[0]} its name reads like another cell's; choose another name")
            keys |= {f"{task.name}-{name}" for task in tasks}
            for key in ("blocks", "lora_rank"):
                positive(f"{here}.{key}", getattr(encoder, key))
                if getattr(encoder, key) is not None and protocol != "finetune":
                    raise wrong(f"{here}.{key}", f"is of the protocol finetune, not of {protocol}")
            if encoder.blocks is not None and encoder.lora_rank is not None:
                raise wrong(here, "blocks and lora_rank are both given; choose one")
            depth = ZOO[chosen.name][1].get("depth") if chosen.name in ZOO else None
            depth = chosen.depth or depth
            if encoder.blocks is not None and depth is not None and encoder.blocks > depth:
                raise wrong(f"{here}.blocks", f"is {encoder.blocks}, the model has {depth}")
            if not encoder.weights:
                raise wrong(f"{here}.weights", "empty; give none, pretrain, a file or hf://...")
            if protocol == "scratch" and encoder.weights != "none":
                raise wrong(f"{here}.weights", "scratch trains from random weights: leave weights out, or say finetune")
            language(f"{here}.language", encoder.language)
            if encoder.seed < 0:
                raise wrong(f"{here}.seed", f"must be at least 0, it is {encoder.seed}")
            if encoder.weights == "pretrain":
                if e.pretrain is None or e.kind == "sweep":
                    raise wrong(f"{here}.weights", "this experiment pretrains nothing; give a file, hf://... or none")
                pretrained = (e.pretrain.model.name, e.pretrain.model.encoder_overrides())
                if (chosen.name, chosen.encoder_overrides()) != pretrained:
                    raise wrong(
                        f"{here}.model", f"this experiment pretrains {pretrained[0]} {pretrained[1]}; leave model out"
                    )
            elif encoder.weights != "none" and not is_remote(encoder.weights):
                exists(f"{here}.weights", encoder.weights)
        for name, space in s.search.items():
            here = f"sweep.search.{name}"
            choice(here, name, ("lr", "weight_decay", "batch_size", "epochs"))
            if name in ("batch_size", "epochs") and not space.values:
                raise wrong(here, "a whole number: give values, as in values: [16, 32]")
            ranged = space.low is not None and space.high is not None
            if ranged == bool(space.values):
                raise wrong(here, "give either low and high, or values")
            if ranged and not (space.low < space.high and (space.low > 0 or not space.log)):  # type: ignore[operator]
                raise wrong(here, f"needs low < high (and low > 0 when log), it is {space.low} to {space.high}")
            least = 0.0 if name == "weight_decay" else 1 if name in ("batch_size", "epochs") else 1e-300
            for value in [*(space.values or []), *(v for v in (space.low, space.high) if v is not None)]:
                if not math.isfinite(value) or value < least:
                    raise wrong(here, f"must be finite and {'at least 0' if not least else 'above 0'}, it has {value}")
                if name in ("batch_size", "epochs") and value != int(value):
                    raise wrong(here, f"must be whole numbers, it has {value}")
            if space.values and (space.low is not None or space.high is not None):
                raise wrong(here, "give either low and high, or values")
            if len(set(space.values or [])) < len(space.values or []):
                raise wrong(here, f"has a value twice: {space.values}")
        if any(
            size < 2
            for size in [
                s.batch_size or 2,
                *((s.search["batch_size"].values or []) if "batch_size" in s.search else []),
            ]
        ):
            raise wrong("sweep.batch_size", "must be at least 2 (batch normalisation)")
        choice("sweep.searcher", s.searcher, ("optuna", "random", "grid"))
        if s.searcher == "grid" and any(not space.values for space in s.search.values()):
            raise wrong("sweep.searcher", "grid needs values (not low and high) for everything it searches")
        choice("sweep.preset", s.preset, ("default", "published"))
        choice("sweep.scheduler", s.scheduler, ("none", "asha"))
        choice("sweep.head", s.head, ("upernet", "light"))
        choice("sweep.precision", s.precision, ("float32", "bf16"))
        choice("sweep.features", s.features, ("auto", "cached", "live"))
        for key in ("trials", "seeds", "epochs", "batch_size", "cpus_per_trial", "cache_gb", "max_concurrent"):
            positive(f"sweep.{key}", getattr(s, key))
        positive("sweep.gpus_per_trial", s.gpus_per_trial, zero=True)
