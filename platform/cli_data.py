"""The `copernicus data` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from copernicus.platform.screen import complain, console, numbers

data = typer.Typer(no_args_is_help=True, help="Make, convert and inspect data.")


@data.command()
def miniature(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    grids: Annotated[int, typer.Option(help="Pretraining grids.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Another seed, another planet.")] = 0,
    scale: Annotated[str, typer.Option(help="tiny, small (small arrays) or full (published sizes).")] = "small",
    tasks: Annotated[
        str | None, typer.Option(help="Benchmark tasks, comma separated; '' for none (all fifteen).")
    ] = None,
) -> None:
    """Make a small procedural planet: pretraining shards and benchmark tasks in the published formats.

    Writes only what is not there yet: ask again with other --tasks to add some.
    """
    from copernicus.datasets.sensors import InputError
    from copernicus.platform.run import make_miniature
    from copernicus.platform.schema import SCALES, Miniature

    if scale not in SCALES:
        raise InputError(f"--scale: no {scale!r}; valid choices: {', '.join(SCALES)}")
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    make_miniature(Miniature(str(out), grids, seed, scale, names), console())


@data.command()
def index(
    shards: Annotated[list[str], typer.Argument(help="Brace patterns, folders, globs; local, s3://, gs://, hf://.")],
    out: Annotated[str | None, typer.Option(help="The index file (index.parquet next to the shards).")] = None,
    fresh: Annotated[bool, typer.Option(help="Read all shards again.")] = False,
) -> None:
    """Index shards by their headers: where each sensor's numbers lie. Resumes; reads only what has changed."""
    from copernicus.platform.data_jobs import index_command

    index_command(shards, out, fresh, console())


@data.command()
def verify(
    places: Annotated[
        list[str],
        typer.Argument(
            help="Shards: brace patterns, folders, globs; local, s3://, gs://, hf://. Or folders of Copernicus-Bench.",
            metavar="SHARDS|FOLDER...",
        ),
    ],
    out: Annotated[str, typer.Option(help="The report, a parquet file.")] = "verify.parquet",
) -> None:
    """Read every member of the shards (this resumes), or every sample of the benchmark's tasks in a folder, whole, and check
    it. Exit code 1 where there are faults."""
    from copernicus.platform.data_jobs import verify_command

    if faulty := verify_command(places, out, console()):
        complain(f"faults in {faulty} of the report's rows: {out}, where `ok` is false")
        raise typer.Exit(1)


@data.command()
def fetch(
    tasks: Annotated[
        list[str],
        typer.Argument(help="Tasks of Copernicus-Bench, levels (L1), satellites (s3), or all.", metavar="TASK..."),
    ],
    out: Annotated[Path, typer.Option(help="The benchmark's folder.")],
    revision: Annotated[
        str | None,
        typer.Option(
            help="Of the hub's repository; md5 sums are published for the default one.", show_default="published"
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the zips.")] = False,
) -> None:
    """Download tasks of Copernicus-Bench from the Hugging Face hub, check and unpack them. The same command goes on."""
    from copernicus.platform.fetch import fetch_command

    fetch_command(tasks, out, console(), revision, keep)


@data.command(context_settings={"ignore_unknown_options": True})
def show(
    grid: Annotated[str, typer.Argument(help="Its seven digits, or LON,LAT.")],
    shards: Annotated[list[str], typer.Argument(help="Brace patterns, folders, globs; local, s3://, gs://, hf://.")],
    out: Annotated[Path | None, typer.Option(help="The picture (GRID.png).")] = None,
) -> None:
    """Draw all sensors, places and dates of one grid in one PNG."""
    from copernicus.platform.data_jobs import show_command

    show_command(grid, shards, out, console())


@data.command()
def convert(
    folder: Annotated[
        Path, typer.Argument(help="The raw layout (fnames*.json.gz or *.tar.zst), or a folder of GeoTIFFs a sensor.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    sensors: Annotated[
        list[str] | None,
        typer.Argument(help="Of sites of your own: S2L1C=s2_toa S1RTC=s1_grd ...", metavar="[FOLDER=SENSOR]..."),
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="Stored side, as in s2_toa=112 (else the published).")] = None,
    patches_per_side: Annotated[
        int, typer.Option(help="Sites: cut s1 and s2 images into this many squared patches.", min=1)
    ] = 1,
    fnames: Annotated[Path | None, typer.Option(help="Raw: the list of images, where there are several.")] = None,
    s2_offset: Annotated[
        str | None, typer.Option(help="Raw: offset to add to Sentinel-2: auto (by each image's metadata), 0 or -1000.")
    ] = None,
    grids_per_shard: Annotated[int | None, typer.Option(help="Raw: 100 as published.", min=1)] = None,
    verify: Annotated[bool, typer.Option(help="Raw: check what is there by its checksum.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show Ray's own log.")] = False,
) -> None:
    """Make pretraining shards of the raw layout (a Ray job; the same command goes on), or of co-registered sites."""
    from copernicus.datasets.sensors import InputError

    sizes = numbers(size or [])
    if sensors:
        for option, value in (
            ("fnames", fnames), ("s2-offset", s2_offset), ("grids-per-shard", grids_per_shard), ("verify", verify),
        ):  # fmt: skip
            if value:
                raise InputError(f"--{option} is for the raw layout, not for {sensors[0]}")
        _convert_sites(folder, out, sensors, sizes, patches_per_side)
        return
    from copernicus.datasets.raw_shards import Settings
    from copernicus.platform.convert import convert_raw, is_raw

    if fnames is None and folder.is_dir() and not is_raw(folder):
        raise InputError(
            f"{folder} is no raw layout (no fnames*.json.gz, no <sensor>_..._chunk001.tar.zst); for images of sites of "
            "your own name the folder of each sensor, as in S2L1C=s2_toa"
        )
    if patches_per_side != 1:
        raise InputError("--patches-per-side is for sites, not for the raw layout, whose patches are given")
    settings = Settings(sizes, grids_per_shard or 100, s2_offset or "auto")
    convert_raw(folder, out, console(), fnames, settings, verify, verbose)


def _convert_sites(folder: Path, out: Path, sensors: list[str], sizes: dict[str, int], patches_per_side: int) -> None:
    from copernicus.datasets.convert import convert_sites
    from copernicus.datasets.sensors import InputError

    pairs = [s.partition("=") for s in sensors]
    if any(not equals for _, equals, _ in pairs):
        raise InputError(f"{' '.join(sensors)}: write FOLDER=SENSOR, as in S2L1C=s2_toa")
    screen = console()
    report = convert_sites(folder, out, {name: sensor for name, _, sensor in pairs}, sizes, patches_per_side)
    for site, notes in report.notes.items():
        for note in notes:
            screen.print(f"{site}: {note}", style="dim", highlight=False, markup=False)
    for site, reason in report.skipped.items():
        screen.print(f"skipped {site}: {reason}", style="yellow", highlight=False, markup=False)
    screen.print(f"{report.sites} sites in {report.grids} grids, in {out}.", highlight=False, markup=False)
    screen.print(f"Next: copernicus run EXPERIMENT.yaml 'pretrain.shards=[{out}]'", highlight=False, markup=False)
