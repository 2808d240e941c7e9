"""The experiment YAML: loading, overriding and validating it (its schema: `schema`).

Every error is one line that names the file, the path in it and the valid choices (`ExperimentError`), found before
anything is created.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from copernicus.datasets.sensors import InputError
from copernicus.platform.schema import NESTED, PUBLISHED, Experiment
from copernicus.platform.secrets import find_secrets


class ExperimentError(InputError):
    """The experiment YAML (or an override) is wrong."""


def load_experiment(path: str | Path, overrides: Sequence[str] = (), here: bool = True) -> Experiment:
    """Read, override (``section.key=value``), resolve and validate an experiment.

    ``here=False``: it will run on another machine. Files that it names need not exist on this one, and an environment
    variable without a default stands for itself (`unknown`); credentials are refused, as others will see the YAML.

    Raises:
        ExperimentError: anything wrong with the file, a key, a type or a value; or a file it names does not exist.
    """
    source = str(path)
    given = _read(source, overrides, passwords=not here)
    try:
        if not here:
            given = OmegaConf.create(_stand_ins(OmegaConf.to_container(given, resolve=False)))
        plain = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
    except (InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException) as error:
        raise ExperimentError(f"{source}: {_full_key(error)}{_first_line(error)}") from None
    assert isinstance(plain, dict)
    _check_keys(plain, Experiment, "", source)
    if isinstance(section := plain.get("pretrain"), dict) and section.get("preset") == "published":
        plain["pretrain"] = {**PUBLISHED, **section}
    experiment = _typed(plain, source)
    experiment = _with_images(experiment)
    from copernicus.datasets.bench import select_tasks
    from copernicus.platform.validation import validate  # which reads the schema above

    validate(experiment, source, elsewhere=not here)
    if experiment.sweep is not None and not any(map(unknown, experiment.sweep.tasks)):
        named = dataclasses.replace(experiment.sweep, tasks=select_tasks(experiment.sweep.tasks))
        experiment = dataclasses.replace(experiment, sweep=named)
    return experiment


def _with_images(experiment: Experiment) -> Experiment:
    """What is embedded is, where nothing else is said, what was pretrained on, at the same sizes."""
    given, own = experiment.embed, experiment.pretrain
    if given is None or own is None:
        return experiment
    if not given.shards and not given.geotiffs:
        given = dataclasses.replace(
            given, shards=own.shards, geotiffs=own.geotiffs, s2_offset=own.s2_offset, index=given.index or own.index
        )
    given = dataclasses.replace(given, image_size={**own.image_size, **given.image_size})
    return dataclasses.replace(experiment, embed=given)


def _read(source: str, overrides: Sequence[str], passwords: bool) -> DictConfig:
    """The YAML with its overrides, unresolved. Access tokens are refused; ``passwords``: those too."""
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ExperimentError(f"{source}: {reason}; give the path of an experiment YAML (see experiments/)") from None
    found = [(f"{source}: {where}", what) for where, what in find_secrets(text, passwords)]
    found += [(f"override {o.partition('=')[0]}", what) for o in overrides for _, what in find_secrets(o, passwords)]
    for where, what in found:
        raise ExperimentError(
            f"{where}: holds {what}, which job pages and logs would show; set it in the environment of the machine that "
            "runs the experiment (of a cluster, its head) and write ${oc.env:NAME} where a value needs it"
        )
    try:
        given = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ExperimentError(f"{source}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except OmegaConfBaseException as error:
        raise ExperimentError(f"{source}: {_first_line(error)}") from None
    except AssertionError:  # of OmegaConf, about a file that is one number
        given = None
    if not isinstance(given, DictConfig):
        raise ExperimentError(f"{source}: an experiment is a mapping of keys to values, and this is none")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ExperimentError(f"override {override!r}: write key=value, as in pretrain.epochs=5")
        try:
            OmegaConf.update(given, key.strip(), yaml.safe_load(value), merge=False, force_add=True)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or _first_line(error)
            raise ExperimentError(
                f"override {override!r}: the value is not valid YAML: {problem}; put texts that hold any of {{}}[],:# in "
                "quotes of their own"
            ) from None
        except OmegaConfBaseException as error:
            raise ExperimentError(f"override {override!r}: {_first_line(error)}") from None
    return given


def _typed(plain: dict[Any, Any], source: str) -> Experiment:
    while True:
        try:
            merged = OmegaConf.merge(OmegaConf.structured(Experiment), OmegaConf.create(plain))
            experiment = OmegaConf.to_object(merged)
        except (ConfigKeyError, ConfigAttributeError, OmegaConfBaseException) as error:
            # What stands for a variable is a text: where another type is wanted, the default is as good a guess.
            if not _drop_unknown(plain, str(getattr(error, "full_key", None) or "")):
                raise ExperimentError(f"{source}: {_full_key(error)}{_first_line(error)}") from None
        else:
            assert isinstance(experiment, Experiment)
            return experiment


STAND_IN = "env."
"""Begins what stands for an environment variable of another machine: ``env.NAME``."""


def unknown(value: str) -> bool:
    """Whether the value depends on an environment variable of the machine that will run the experiment."""
    return STAND_IN in value


def _stand_ins(tree: Any) -> Any:
    """``${oc.env:NAME}`` -> ``env.NAME``, ``${oc.env:NAME,default}`` -> ``default``, whatever is set here."""
    if isinstance(tree, Mapping):
        return {key: _stand_ins(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_stand_ins(value) for value in tree]
    if isinstance(tree, str):
        tree = re.sub(r"\$\{oc\.env:\s*[\w.]+\s*,\s*([^{}]*?)\s*\}", r"\1", tree)
        return re.sub(r"\$\{oc\.env:\s*([\w.]+)\s*\}", rf"{STAND_IN}\1", tree)
    return tree


def _drop_unknown(plain: dict[Any, Any], full_key: str) -> bool:
    """Takes the value at ``full_key`` out if it stands for a variable."""
    *parents, last = full_key.split(".")
    section: Any = plain
    for parent in parents:
        section = section.get(parent) if isinstance(section, Mapping) else None
    if not isinstance(section, dict) or not isinstance(value := section.get(last), str) or not unknown(value):
        return False
    del section[last]
    return True


def _check_keys(given: Mapping[Any, Any], schema: type, path: str, source: str) -> None:
    """Unknown keys, said with the path and the valid keys (OmegaConf's own error names neither well)."""
    fields = typing.get_type_hints(schema)
    for key, value in given.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ExperimentError(f"{source}: {where}: unknown key; {hint}valid keys: {', '.join(fields)}")
        nested = _dataclass_of(fields[key])
        if nested is not None:
            if isinstance(value, Mapping):
                _check_keys(value, nested, where, source)
            elif value is not None:
                valid = ", ".join(f.name for f in dataclasses.fields(nested))
                raise ExperimentError(f"{source}: {where}: must be a section with the keys {valid}, not {value!r}")
        elif typing.get_origin(fields[key]) is list and not isinstance(value, list):
            raise ExperimentError(f"{source}: {where}: must be a list, as in [a, b], not {value!r}")
        elif typing.get_origin(fields[key]) is dict and not isinstance(value, Mapping):
            raise ExperimentError(f"{source}: {where}: must be a section, as in {{name: value}}, not {value!r}")
        elif key in NESTED:
            for name, inner in value.items():
                if inner is None or not isinstance(inner, Mapping):
                    valid = ", ".join(f.name for f in dataclasses.fields(NESTED[key]))
                    raise ExperimentError(
                        f"{source}: {where}.{name}: must be a section with the keys {valid}, not {inner!r}"
                    )
                _check_keys(inner, NESTED[key], f"{where}.{name}", source)


def _dataclass_of(annotation: Any) -> type | None:
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return next((o for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)), None)


def _full_key(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    return f"{key}: " if key else ""


def _first_line(error: Exception) -> str:
    if unset := re.search(r"Environment variable '(.+)' not found", str(error)):
        return f"the environment variable {unset[1]} is not set; set it, or override this key"
    return str(getattr(error, "msg", None) or error).strip().splitlines()[0]
