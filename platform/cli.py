"""The ``copernicus`` command. Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from copernicus.platform.cli_data import data
from copernicus.platform.screen import complain, console, numbers

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Experiments with the Copernicus Earth-observation foundation model, on Ray.",
)
app.add_typer(data, name="data")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, as in pretrain.epochs=5.", metavar="[KEY=VALUE]...")
]
Yaml = Annotated[Path, typer.Argument(help="The experiment YAML.", metavar="EXPERIMENT.yaml")]
Cluster = Annotated[
    Path | None, typer.Option(help="The file that `ray up` was given; reached through SSH.", metavar="CLUSTER.yaml")
]
Address = Annotated[
    str | None,
    typer.Option(help="The job server, http://...", show_default="RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265"),
]
Job = Annotated[str, typer.Argument(help="As `copernicus jobs` lists it.", metavar="JOB")]


@app.command()
def run(
    experiment: Yaml,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Start anew; earlier results are kept aside.")] = False,
    verbose: Annotated[bool, typer.Option(help="Show Ray's own log.")] = False,
) -> None:
    """Run an experiment here, or on the Ray cluster that RAY_ADDRESS names. The same command resumes it."""
    from copernicus.platform.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or [])
    from copernicus.platform.run import run_experiment
    from copernicus.platform.session import ending_on_sigterm

    try:
        with ending_on_sigterm():
            run_experiment(loaded, console(), fresh=fresh, verbose=verbose)
    except KeyboardInterrupt:  # said here: Typer makes a silent exit of it
        complain("interrupted; the same command goes on where it stopped")
        raise typer.Exit(130) from None


@app.command()
def check(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Experiment YAMLs or cluster files, then overrides.", metavar="EXPERIMENT.yaml|CLUSTER.yaml..."
        ),
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print the resolved experiments.")] = False,
) -> None:
    """Validate experiments and print them resolved; validate files of clusters; run nothing."""
    from copernicus.datasets.sensors import InputError
    from copernicus.platform.cluster_files import check_cluster_file, is_cluster_file
    from copernicus.platform.experiment import load_experiment

    overrides = [f for f in files if "=" in f and not Path(f).exists()]
    failed = 0
    out = console()
    for file in (f for f in files if f not in overrides):
        try:
            if is_cluster_file(file):
                unfilled = check_cluster_file(file)
                for line in unfilled:
                    out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
                state = f"a template: {len(unfilled)} placeholders are left" if unfilled else "ready"
                out.print(f"[green]ok[/] {file} (cluster, {state})")
                continue
            loaded = load_experiment(file, overrides)
        except InputError as error:
            complain(str(error))
            failed += 1
            continue
        if not quiet:
            out.print(loaded.to_yaml(), markup=False, highlight=False, end="")
        out.print(f"[green]ok[/] {file} ({loaded.kind}, {loaded.fingerprint})")
    if failed:
        raise typer.Exit(2)


@app.command()
def submit(
    experiment: Yaml,
    overrides: Overrides = None,
    cluster: Cluster = None,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the job.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; earlier results are kept aside.")] = False,
    storage: Annotated[
        str | None,
        typer.Option(help="The nodes' shared folder to work in.", show_default="the head's COPERNICUS_STORAGE"),
    ] = None,
) -> None:
    """Run an experiment on a cluster, as a job of the code that is installed here; follow its log; end as it ends."""
    from copernicus.platform.submit import Where, submit_command

    raise typer.Exit(
        submit_command(experiment, overrides or [], Where(cluster, address), console(), detach, fresh, storage)
    )


@app.command()
def jobs(cluster: Cluster = None, address: Address = None) -> None:
    """List a cluster's jobs."""
    from copernicus.platform.submit import Where, jobs_command

    jobs_command(Where(cluster, address), console())


@app.command()
def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends; ends as it ends.")] = False,
    cluster: Cluster = None,
    address: Address = None,
) -> None:
    """Print a job's log."""
    from copernicus.platform.submit import Where, logs_command

    raise typer.Exit(logs_command(job, Where(cluster, address), console(), follow))


@app.command()
def stop(job: Job, cluster: Cluster = None, address: Address = None) -> None:
    """End a job; submitted again, the experiment goes on where it stopped."""
    from copernicus.platform.submit import Where, stop_command

    raise typer.Exit(stop_command(job, Where(cluster, address), console()))


@app.command()
def plan(
    experiment: Yaml,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="h100, a100, l4, t4, cpu, or here: this machine, measured for some seconds.")
    ] = "h100",
    workers: Annotated[int | None, typer.Option(help="GPUs (of cpu: workers).", show_default="the YAML's")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="Workers of a node.")] = 8,
    grids: Annotated[int | None, typer.Option(help="Of the data, where the shards are not here.")] = None,
    read_rate: Annotated[
        float | None, typer.Option(help="What storage gives a node, MB/s.", show_default="1000, a guess")
    ] = None,
    network: Annotated[
        float | None, typer.Option(help="What a node sends, Gbit/s.", show_default="a common instance's")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of a node and hour: look it up, prices change.")] = None,
    spot_price: Annotated[float | None, typer.Option(help="The same, of a node that may be taken away.")] = None,
) -> None:
    """Estimate time, data rates, memory, storage and cost on so many GPUs; run nothing, and say what is only assumed."""
    from copernicus.platform.experiment import load_experiment
    from copernicus.platform.plan_table import plan_command

    loaded = load_experiment(experiment, overrides or [], here=False)
    plan_command(
        loaded, console(), gpu, workers, gpus_per_node, grids=grids, read_rate=read_rate, network=network, price=price,
        spot_price=spot_price,
    )  # fmt: skip


@app.command()
def leaderboard(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders of finished sweeps, such as runs/quickstart-1a2b3c4d.")
    ] = None,
    mlflow: Annotated[str | None, typer.Option(help="Rebuild it from this MLflow store or server instead.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow: the experiment (else all are searched).")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="MLflow: name or id of a sweep; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write it to: HTML, Markdown, CSV, JSON, PNG.")] = None,
) -> None:
    """Print the leaderboard of sweeps, together where several are given; from their folders, or from MLflow alone."""
    from copernicus.datasets.sensors import InputError
    from copernicus.platform.board_files import read_leaderboard, write_leaderboard
    from copernicus.platform.leaderboard import join
    from copernicus.platform.tables import terminal

    if bool(folders) == bool(mlflow):
        raise InputError("leaderboard: give folders of sweeps, or --mlflow with the URI of a store")
    if mlflow:
        from copernicus.platform.tracking_read import read_mlflow

        title, board = read_mlflow(mlflow, experiment, sweep or [])
    else:
        assert folders
        for option, value in (("experiment", experiment), ("sweep", sweep)):
            if value:
                raise InputError(f"--{option} chooses among what --mlflow names; folders are given as they are")
        # By name as long as that tells them apart.
        paths = {str(folder): folder for folder in folders}
        names = {folder.absolute().name for folder in paths.values()}
        short = len(names) == len(paths)
        boards = {folder.absolute().name if short else name: read_leaderboard(folder) for name, folder in paths.items()}
        title, board = " + ".join(boards), join(boards)
    screen = console()
    for shown in terminal(board):
        screen.print(shown)
    if out is not None:
        files = write_leaderboard(board, out, title)
        screen.print(f"Written to {out}: {', '.join(f.name for f in files)}", highlight=False, markup=False)


@app.command()
def encode(
    images: Annotated[list[str], typer.Argument(help="GeoTIFF or NetCDF images, then model sizes as in depth=4.")],
    sensor: Annotated[str, typer.Option(help="s1_grd, s2_toa, s3_olci, s5p_no2, dem, ...")],
    out: Annotated[Path, typer.Option(help="Parquet file to write; pictures go beside it.")] = Path(
        "embeddings.parquet"
    ),
    weights: Annotated[str | None, typer.Option(help="A weights file, a checkpoint, runs:/... or hf://...")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model of the zoo, or package.module:Class; a checkpoint of ours knows its own.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Window side, pixels.", min=1)] = None,
    patch_kernel: Annotated[int | None, typer.Option(help="Token side, pixels.", min=1)] = None,
    language: Annotated[str | None, typer.Option(help="Embeddings of variables' names: a file or hf://...")] = None,
) -> None:
    """Embed real images: reads bands, place and date, says what it found, draws what the encoder sees."""
    from copernicus.datasets.sensors import InputError
    from copernicus.platform.checkpoint import architecture
    from copernicus.platform.encode import encode_command

    sizes = numbers([i for i in images if "=" in i and not Path(i).exists()])
    files = [i for i in images if "=" not in i or Path(i).exists()]
    known = architecture(weights) if weights else None
    name, overrides = known or (model or "copernicus_fm_base", {})
    if known and ((model or name) != name or any(overrides.get(k, v) != v for k, v in sizes.items())):
        raise InputError(f"--weights {weights} is of {name} {overrides}; leave the model and its sizes out")
    summary = encode_command(
        files, sensor, weights, out, name, {**overrides, **sizes}, console(),
        image_size=image_size, patch_kernel=patch_kernel, language=language,
    )  # fmt: skip
    console().print(f"Look at [bold]{summary.quicklooks[0]}[/]; embeddings are in {summary.embeddings}")


@app.command()
def similar(
    where: Annotated[Path, typer.Argument(help="An experiment's folder, one of embeddings, or grids.parquet.")],
    image: Annotated[Path | None, typer.Argument(help="An image to compare with; or give --lon and --lat.")] = None,
    lon: Annotated[float | None, typer.Option(help="Longitude of the place, degrees.")] = None,
    lat: Annotated[float | None, typer.Option(help="Latitude of the place, degrees.")] = None,
    sensor: Annotated[str | None, typer.Option(help="Compare images of this sensor alone; an image needs it.")] = None,
    k: Annotated[int, typer.Option(help="How many cells.", min=1)] = 10,
    apart: Annotated[float, typer.Option(help="Only cells at least so many km away.", min=0)] = 0.0,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("similar.png"),
) -> None:
    """Find the cells of the globe that are most like a place or an image."""
    from copernicus.platform.similar import similar_command

    similar_command(where, lon, lat, image, sensor, k, apart, out, console())


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A run's checkpoint: its file or folder, runs:/..., hf://...")],
    out: Annotated[Path, typer.Option(help="FILE.pth or FILE.safetensors to write.")],
    part: Annotated[str, typer.Option(help="encoder, or autoencoder (the decoder too).")] = "encoder",
    pool: Annotated[
        str | None,
        typer.Option(
            help="An encoder's last norm: mean (fc_norm: TorchGeo, this platform), token (norm: class token) or none (as "
            "published: the public benchmark's classification).",
            show_default="mean",
        ),
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the file where it is there already.")] = False,
) -> None:
    """Write a checkpoint's weights in the published format, for the public code and TorchGeo."""
    from copernicus.platform.export import export_command

    export_command(checkpoint, out, part, pool, force, console())


@app.command()
def ui(
    uri: Annotated[str, typer.Option(help="The MLflow store.")] = "sqlite:///mlflow.db",
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 5000,
    cluster: Cluster = None,
) -> None:
    """Open the MLflow store's web page, or that of a cluster's server, at http://127.0.0.1:5000 (Ctrl-C ends it)."""
    if cluster is not None:
        from copernicus.platform.submit import ui_command

        ui_command(cluster, port, console())
        return
    from copernicus.platform.tracking import serve

    page = f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning"
    console().print(f"MLflow at {page} (Ctrl-C ends it)", soft_wrap=True)
    code = serve(uri, port)
    raise typer.Exit(0 if code in (0, -15, -2) else 1)


@app.command()
def doctor(
    experiment: Annotated[
        str | None, typer.Argument(help="Also what this experiment needs.", metavar="[EXPERIMENT.yaml]")
    ] = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
    address: Annotated[
        str | None, typer.Option(help="The job server of a cluster, http://...", show_default="none: check here")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="The folder that all nodes share.", show_default="COPERNICUS_STORAGE")
    ] = None,
    tracking: Annotated[
        str | None,
        typer.Option(help="The MLflow store or server.", show_default="the experiment's, or MLFLOW_TRACKING_URI"),
    ] = None,
) -> None:
    """Check this machine (or the Ray cluster that RAY_ADDRESS names), or a cluster from outside: versions, access, storage,
    MLflow, GPUs, clocks. Exit code 1 where something fails."""
    from copernicus.platform.doctor import doctor_command
    from copernicus.platform.submit import Where

    given = None if experiment is None else Path(experiment)
    raise typer.Exit(doctor_command(given, overrides or [], Where(cluster, address), storage, tracking, console()))


def main() -> None:
    """Entry point: turns what goes wrong into one plain message and an exit code."""
    from copernicus.datasets.sensors import InputError

    try:
        code = app(standalone_mode=False)
    except InputError as error:
        complain(str(error))
        code = 2
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on where it stopped")
        code = 130
    except typer.Abort:  # what click makes of Ctrl-C
        complain("interrupted; the same command goes on where it stopped")
        code = 130
    except Exception as error:
        code = _failed(error)
    sys.exit(code if isinstance(code, int) else 0)


def _failed(error: Exception) -> int:
    if hasattr(error, "format_message"):  # a wrong option or argument; click's classes, which typer may have its own of
        complain(f"{error.format_message()} (--help lists what there is)")
        return 2
    from copernicus.datasets.storage import StoreError
    from copernicus.platform.cluster import JobServerLost
    from copernicus.platform.convert import ConvertFailed
    from copernicus.platform.embed import EmbedFailed
    from copernicus.platform.fetch import FetchFailed
    from copernicus.platform.pretrain import PretrainFailed
    from copernicus.platform.spool import NotRecorded
    from copernicus.platform.sweep import SweepFailed

    if isinstance(error, (FetchFailed, NotRecorded)):
        complain(f"{error}")
        return 1
    if isinstance(error, JobServerLost):
        complain(f"the job server: {error}")
        return 1
    if isinstance(error, ConvertFailed):
        complain(f"{error}. The same command goes on where it stopped")
        return 1
    if isinstance(error, PretrainFailed):
        complain(f"{error}. The same command goes on from the last checkpoint")
        return 1
    if isinstance(error, EmbedFailed):
        complain(f"{error}. The same command goes on where it stopped")
        return 1
    if isinstance(error, SweepFailed):
        complain(f"{error}. Once that is mended, the same command runs what is unfinished")
        return 1
    if isinstance(error, StoreError):
        complain(f"{error}. The same command goes on where it stopped")
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        complain(f"{error.strerror}{where}; free some, and the same command goes on where it stopped")
        return 1
    Console(stderr=True).print_exception(max_frames=12)
    complain(f"{type(error).__name__}: {error}")
    return 1


if __name__ == "__main__":
    main()
