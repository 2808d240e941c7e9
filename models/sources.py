"""Where a weights file comes from: a path, a checkpoint's folder, MLflow's artifacts or the Hugging Face hub.

Each kind ends in a path on this machine. The hub's files are kept in its own cache and checked there; MLflow's are
fetched into a folder that goes when they have been read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from copernicus.datasets.sensors import InputError

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")
MLFLOW_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/")

_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@((?:refs/(?:convert|pr)/)?[^/]+))?/(.+)")


def is_remote(source: str | Path) -> bool:
    """True: the source is an address, of which only reading can tell whether it is there."""
    return str(source).startswith(("hf://", *MLFLOW_SCHEMES))


@contextlib.contextmanager
def local_file(source: str | Path, suffixes: Sequence[str] = WEIGHT_SUFFIXES, what: str = "weights") -> Iterator[Path]:
    """The file that a source stands for, on this machine for as long as the context lasts.

    Args:
        source: a file; a folder that holds one, or several of which one is called ``model`` or ``checkpoint``;
            ``runs:/<run>/path``, ``models:/<name>/<version>/path`` or ``mlflow-artifacts:/path`` (of the store that
            MLFLOW_TRACKING_URI names); or ``hf://owner/repository[@revision]/file`` (hub of HF_ENDPOINT, cache of
            HF_HOME; HF_HUB_OFFLINE=1 keeps to the cache).
        suffixes: those of the files to look for in a folder.
        what: what it holds, for messages.

    Raises:
        InputError: no such file, a store that cannot be reached, or a damaged file in the hub's cache.
    """
    text = str(source)
    if text.startswith("hf://"):
        yield _from_hub(text, what)
    elif text.startswith(MLFLOW_SCHEMES):
        with tempfile.TemporaryDirectory(prefix="copernicus-") as folder:
            yield _in_folder(_from_mlflow(text, folder, what), suffixes, what, text)
    else:
        yield _in_folder(Path(source), suffixes, what, text)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _in_folder(path: Path, suffixes: Sequence[str], what: str, source: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        hint = "; sources are files, folders, hf://..., runs:/... and models:/..." if "://" in source else ""
        raise InputError(f"{what}: no file or folder {source}{hint}")
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    named = [file for file in files if file.stem in ("model", "checkpoint")]
    chosen = files if len(files) == 1 else named
    if len(chosen) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(
            f"{what}: folder {source} should hold one {' / '.join(suffixes)} file; found {found}; name the file itself"
        )
    return chosen[0]


def _from_mlflow(uri: str, folder: str, what: str) -> Path:
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise InputError(f"{what} {uri}: MLflow is not installed here; pip install mlflow, or give a file") from None
    store = mlflow.get_tracking_uri()
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():  # would be made
        raise InputError(f"{what} {uri}: no MLflow store {store}; set MLFLOW_TRACKING_URI to the one that holds it")
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError) as error:
        message = (
            f"{what} {uri}: cannot be fetched from the MLflow store {mlflow.get_tracking_uri()} ({_first_line(error)}); "
            "check the run and the path, or set MLFLOW_TRACKING_URI to the store that holds it"
        )
        # Without a password, wherever it stands. What raised it would show it again.
        raise InputError(re.sub(r"(://[^:/@\s]*:)[^@\s]*@", r"\1***@", message)) from None


def _from_hub(url: str, what: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    parts = _HUB.fullmatch(url)
    if parts is None:
        raise InputError(f"{what} {url!r}: write hf://owner/repository/file or hf://owner/repository@revision/file")
    repository, revision, file = parts[1], unquote(parts[2] or "main"), parts[3]
    here = f"{what} {url}"
    try:
        # Its bar shows on a terminal only; an interrupted download goes on where it stopped.
        path = Path(hf_hub_download(repository, file, revision=revision))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        by_hand = f"{constants.ENDPOINT}/{repository}/resolve/{revision}/{file}"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set: unset it to download"
        else:
            reason = f"{constants.ENDPOINT} cannot be reached ({_first_line(error.__cause__ or error)}): try again, or "
            reason += "set HF_ENDPOINT to a mirror"
        raise InputError(
            f"{here}: not in the cache {constants.HF_HUB_CACHE}, and {reason}; or set HF_HOME to a cache that has it; "
            f"or fetch {by_hand} by hand and give that file's path"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"{here}: access must be asked for on the hub's page, then `hf auth login` or HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{here}: {repository} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{here}: the hub {constants.ENDPOINT} knows no model {repository!r}, or HF_TOKEN may not read it"
        ) from error
    except EntryNotFoundError as error:
        raise InputError(f"{here}: {repository} has no file {file!r} at revision {revision!r}") from error
    except HFValidationError as error:
        raise InputError(f"{here}: not a name that the hub may have ({_first_line(error)})") from error
    except Exception as error:  # of requests or httpx, whichever the hub's client was made with
        raise InputError(
            f"{here}: the download failed ({_first_line(error)}); the same command goes on where it stopped"
        ) from error
    _check_blob(path, here)
    return path


def _check_blob(path: Path, here: str) -> None:
    """The hub's cache names a large file after its sha256, a small one after git's sha1 of it: so damage shows."""
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # copied, not linked: a cache without symbolic links keeps no names to check
    if len(blob.name) == 64:
        digest = file_digest(blob)
    else:
        content = blob.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if digest != blob.name:
        raise InputError(
            f"{here}: the cached file {blob} is damaged (its checksum is {digest[:12]}...); delete it, and the same "
            "command downloads it again"
        )


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
