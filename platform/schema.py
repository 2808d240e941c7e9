"""The experiment YAML's schema, as frozen dataclasses: what can be said, and what is meant where nothing is said."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml

from copernicus.datasets.sensors import SENSORS
from copernicus.platform.secrets import scrub
from copernicus.platform.tracking import mask

# Optional[...] rather than `| None` below: OmegaConf reads these annotations on Python 3.10 too.
# ruff: noqa: UP045


@dataclass(frozen=True)
class Tracking:
    """Where runs are recorded. ``uri``: an MLflow store or server; left out, the one that MLFLOW_TRACKING_URI names, else
    a file in the working directory."""

    uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    experiment: str = "copernicus"


@dataclass(frozen=True)
class Miniature:
    """A miniature Earth to make first: shards under ``out``/pretrain, benchmark tasks under ``out``/bench.

    ``tasks`` says which, in the words of a sweep's (names, levels, satellites, "all"); all fifteen where it is not given.
    Others can be added to a miniature that is there already."""

    out: str = "runs/miniature"
    grids: int = 256
    seed: int = 0
    scale: str = "small"
    tasks: Optional[list[str]] = None

    def task_names(self) -> list[str]:
        """The tasks to write: of one in another mode, the task itself.

        Raises:
            InputError: an item of ``tasks`` means none; the message lists the valid ones.
        """
        from copernicus.datasets.bench import select_tasks

        chosen = select_tasks(["all"] if self.tasks is None else self.tasks)
        return list(dict.fromkeys(name.partition("-")[0] for name in chosen))


@dataclass(frozen=True)
class Model:
    """A name of the model zoo; the other keys, where given, replace the named model's sizes.

    In a sweep also an encoder from elsewhere, ``package.module:Class`` (see CONTRIBUTING.md)."""

    name: str = "copernicus_fm_base"
    embed_dim: Optional[int] = None
    depth: Optional[int] = None
    num_heads: Optional[int] = None
    decoder_embed_dim: Optional[int] = None
    decoder_depth: Optional[int] = None
    decoder_num_heads: Optional[int] = None

    def encoder_overrides(self) -> dict[str, int]:
        return {k: v for k in ("embed_dim", "depth", "num_heads") if (v := getattr(self, k)) is not None}

    def overrides(self) -> dict[str, int]:
        return {
            f.name: v for f in dataclasses.fields(self) if f.name != "name" and (v := getattr(self, f.name)) is not None
        }


@dataclass(frozen=True)
class Distill:
    """The encoder also imitates a frozen DINOv2 on Sentinel-2's red, green and blue. ``teacher``: a folder with
    config.json and model.safetensors, or hf://owner/repository (published: hf://facebook/dinov2-base)."""

    teacher: str = ""
    weight: float = 0.1
    cache: Optional[str] = None  # folder that keeps the teacher's features; none: they are computed at every step

    def absolute(self) -> Distill:
        """With folders that a process in another directory finds as well."""
        teacher = self.teacher if self.teacher.startswith("hf://") else str(Path(self.teacher).absolute())
        return dataclasses.replace(self, teacher=teacher, cache=self.cache and str(Path(self.cache).absolute()))


@dataclass(frozen=True)
class Pretrain:
    """Masked-autoencoder pretraining. Learning rate as published: ``blr`` * batch_size / 256 after the warm-up.

    ``preset: published`` reproduces the public code's defects (CONTRIBUTING.md lists them) and gives the keys of
    `PUBLISHED`, where the YAML leaves them out, other defaults than these.
    """

    shards: list[str] = field(default_factory=list)
    geotiffs: Optional[str] = None  # in place of shards: the folder of a raw layout, with its fnames*.json.gz
    s2_offset: str = "auto"  # of raw Sentinel-2 images: by their metadata (auto), 0, or -1000 (since baseline 04.00)
    index: Optional[str] = None  # of the shards; none: the one next to them, else one that the output folder keeps
    preset: str = "default"  # or published
    require: str = "any"  # any: grids with any of the sensors train with those they have; all: only whole ones
    model: Model = field(default_factory=Model)
    distill: Optional[Distill] = None
    sensors: list[str] = field(default_factory=lambda: list(SENSORS))
    language: Optional[str] = None  # embeddings of variables' names: a file, runs:/... or hf://...; none: stand-ins
    image_size: dict[str, int] = field(default_factory=dict)
    epochs: int = 100
    draws_per_grid: int = 1
    batch_size: int = 256
    blr: float = 1.5e-4
    min_lr: float = 0.0
    warmup_epochs: float = 10.0
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_grad_norm: Optional[float] = None
    mask_ratio: float = 0.7
    norm_pix_loss: bool = True
    channel_fraction: list[float] = field(default_factory=lambda: [0.75, 1.0])
    metadata_drop: float = 0.1
    val_fraction: float = 0.05
    val_every: int = 1
    precision: str = "auto"  # of products: float32, bf16 (autocast), or auto: bf16 on a GPU that has it
    compile: Optional[bool] = None  # torch.compile of the blocks; none: on a GPU
    activation_checkpointing: bool = False  # blocks are computed again in the backward pass: slower, less memory
    workers: Any = 2  # how many, or [fewest, most]: as many as the cluster has room for, whenever that changes
    micro_batch_size: Optional[int] = None  # rows that a worker takes at once; what is more of its share is accumulated
    parallel: str = "ddp"  # ddp: each worker holds the whole model; fsdp: a share of it, for those that fit no GPU
    cpus_per_worker: float = 0.5
    gpus_per_worker: float = 0.0
    data_cpus: float = 1.0
    checkpoint_every: int = 1
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    max_failures: int = 3  # in a row, without a step that is further than before
    hang_minutes: Optional[float] = (
        30.0  # without a step: the workers' stacks are kept and they start anew; null: never
    )
    max_skipped: float = 0.05

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        low, high = self.workers if isinstance(self.workers, list) else (self.workers, self.workers)
        return low, high


@dataclass(frozen=True)
class Encoder:
    """What a sweep compares. ``weights``: none (random), pretrain (made by this experiment), a file, or hf://...;
    ``model``: as in pretrain; left out, it is the model that this experiment pretrains."""

    weights: str = "none"
    model: Optional[Model] = None
    seed: int = 0
    language: Optional[str] = None  # as in pretrain; left out with weights: pretrain, it is pretrain's
    protocol: Optional[str] = None  # left out, it is the sweep's
    blocks: Optional[int] = None  # finetune: train the last so many blocks only
    lora_rank: Optional[int] = None  # finetune: train low-rank additions to the blocks instead of their weights


@dataclass(frozen=True)
class Space:
    """Values that a search draws: ``low``-``high`` (log-uniform unless ``log: false``), or one of ``values``."""

    low: Optional[float] = None
    high: Optional[float] = None
    log: bool = True
    values: Optional[list[float]] = None


@dataclass(frozen=True)
class Sweep:
    """Tasks x encoders: a search in each cell, then ``seeds`` repetitions of its best setting.

    ``tasks``: names, levels (L1, L2, L3), sensors (s1, s2, s3, s5p) or all. ``protocol``: probe (a head on the frozen
    encoder), knn, ridge or logistic (quick looks at image-level tasks, without a search), finetune, or scratch
    (supervised from random weights).
    """

    data: str = ""
    tasks: list[str] = field(default_factory=list)
    encoders: dict[str, Encoder] = field(default_factory=dict)
    protocol: str = "probe"
    head: str = "upernet"  # of dense tasks: upernet (as published) or light (a few convolutions on the token grid, for a laptop)
    search: dict[str, Space] = field(default_factory=dict)
    searcher: str = "optuna"
    scheduler: str = "none"  # or asha: settings that fall behind are stopped early
    trials: int = 8
    seeds: int = 3
    epochs: int = 50
    batch_size: Optional[int] = None
    image_size: dict[str, int] = field(default_factory=dict)
    preset: str = "default"
    precision: str = "float32"  # of the frozen encoder: float32, or bf16 (autocast)
    features: str = (
        "auto"  # cached, live (encoded again whenever they are used), or auto: cached where they fit cache_gb
    )
    cache: str = "runs/features"
    cache_gb: Optional[float] = 100.0  # the least recently used features beyond that are removed; null: no limit
    max_concurrent: Optional[int] = None  # trials at once; none: as many as the cluster has room for
    cpus_per_trial: float = 1.0
    gpus_per_trial: float = 0.0


MAP_FORMATS = ("npz", "pt", "zarr")


@dataclass(frozen=True)
class Embed:
    """Every image of the shards through a frozen encoder: a row an image, their mean a grid, the map of the globe.

    ``encoder``: as in a sweep. ``shards``, ``geotiffs``, ``s2_offset``, ``index``: as in pretrain; without shards or
    geotiffs, they are pretrain's."""

    encoder: Encoder = field(default_factory=Encoder)
    shards: list[str] = field(default_factory=list)
    geotiffs: Optional[str] = None
    s2_offset: str = "auto"
    index: Optional[str] = None
    sensors: list[str] = field(default_factory=lambda: list(SENSORS))
    image_size: dict[str, int] = field(default_factory=dict)
    batch_size: int = 64  # images of one sensor
    precision: str = "float32"  # or bf16 (autocast)
    grids_per_chunk: int = 128  # what is lost with a worker; a parquet file each
    formats: list[str] = field(default_factory=lambda: list(MAP_FORMATS))  # of the map
    workers: Optional[int] = None  # none: as many as the cluster has room for; 0: the driver itself
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    max_skipped: float = 0.05  # of the images


@dataclass(frozen=True)
class Climate:
    """How much of the climate embeddings tell: ridge regressions from places, embeddings and both to values of cells.

    ``targets``: NetCDF or parquet on a 0.25-degree grid. ``embeddings``: the folder of a finished embed stage, or its
    grids.parquet; left out, this experiment's."""

    targets: str = ""
    variables: Optional[list[str]] = None  # none: all that the targets have
    embeddings: Optional[str] = None
    inputs: list[str] = field(default_factory=lambda: ["coordinates", "harmonics", "embeddings", "both"])
    splits: list[str] = field(default_factory=lambda: ["random", "blocks"])
    block_degrees: float = 10.0  # of the spatial blocks
    cells: Optional[int] = 10000  # drawn at random; none: all


@dataclass(frozen=True)
class Experiment:
    """One experiment. ``kind`` says what runs: one of the sections, or pipeline (every section given, in this order)."""

    name: str = "experiment"
    kind: str = "pipeline"
    seed: int = 0
    output: str = "runs"
    tracking: Tracking = field(default_factory=Tracking)
    miniature: Optional[Miniature] = None
    pretrain: Optional[Pretrain] = None
    sweep: Optional[Sweep] = None
    embed: Optional[Embed] = None
    climate: Optional[Climate] = None

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of what determines the results: not of where they are kept or recorded, nor of how many
        workers and CPUs make them, so that a run resumes elsewhere, or on fewer."""
        content = {
            key: value
            for key, value in self.parameters().items()
            if not any(key == other or key.startswith(f"{other}.") for other in WITHOUT_EFFECT)
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def folder(self) -> Path:
        """Where this experiment keeps checkpoints and results: the same settings find the same folder, and resume."""
        return Path(self.output).absolute() / f"{self.name}-{self.fingerprint}"

    def parameters(self) -> dict[str, Any]:
        """The resolved experiment, flattened: ``pretrain.blr`` -> value. Credentials are masked."""
        return dict(_flatten(self._shown()))

    def to_yaml(self) -> str:
        """The resolved experiment. Credentials are masked."""
        return yaml.safe_dump(_without_none(self._shown()), sort_keys=False)

    def _shown(self) -> dict[str, Any]:
        shown = _scrubbed(dataclasses.asdict(self))  # an environment variable's value may be in any text
        return shown | {"tracking": shown["tracking"] | {"uri": mask(self.tracking.uri)}}


SCALES = ("tiny", "small", "full")
QUICK = ("knn", "ridge", "logistic")
FROZEN = ("probe", *QUICK)
PROTOCOLS = (*FROZEN, "finetune", "scratch")
"""What may be done with an encoder: see `Sweep`. ``QUICK`` ones draw nothing and search for themselves; ``FROZEN`` ones leave
the encoder as it is."""
WITHOUT_EFFECT = (
    "tracking", "output", "miniature.tasks",
    "pretrain.compile", "pretrain.activation_checkpointing", "pretrain.workers", "pretrain.micro_batch_size", "pretrain.hang_minutes", "pretrain.parallel", "pretrain.cpus_per_worker", "pretrain.gpus_per_worker", "pretrain.data_cpus",
    "pretrain.index", "pretrain.distill.cache", "pretrain.checkpoint_every", "pretrain.checkpoint_minutes", "pretrain.keep_checkpoints", "pretrain.max_failures", "pretrain.max_skipped",
    "sweep.cache", "sweep.cache_gb", "sweep.features", "sweep.max_concurrent", "sweep.cpus_per_trial", "sweep.gpus_per_trial",
    "embed.index", "embed.formats", "embed.workers", "embed.cpus_per_worker", "embed.gpus_per_worker", "embed.max_skipped",
)  # fmt: skip
"""Keys (and sections) that leave the results as they are."""
PUBLISHED: dict[str, Any] = {"require": "all", "metadata_drop": 0.0, "precision": "float32"}
"""Defaults of ``pretrain.preset: published``."""
CLIMATE_INPUTS = ("coordinates", "harmonics", "embeddings", "both")
"""What a climate probe regresses from: place as numbers, place as spherical harmonics (a strong baseline), embeddings, or
coordinates and embeddings."""
FEWEST = 50
"""Cells with which a climate probe is worth its name: a fifth of them is the test part."""
CLIMATE_SPLITS = ("random", "blocks")
CLIMATE_SUFFIXES = (".nc", ".nc4", ".parquet")
STAGES = ("pretrain", "sweep", "embed", "climate")
"""Sections that are run, in this order."""
SECTIONS: dict[str, tuple[str, ...]] = {**{stage: (stage,) for stage in STAGES}, "pipeline": ()}
NESTED = {"encoders": Encoder, "search": Space}


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif tree is not None:
        yield prefix, tree


def _scrubbed(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _scrubbed(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_scrubbed(v) for v in tree]
    return scrub(tree) if isinstance(tree, str) else tree


def _without_none(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _without_none(v) for k, v in tree.items() if v is not None}
    return tree
