"""Cluster files, checked before anything is paid for: those of `ray up` here, Kubernetes' manifests in `kuberay_files.py`.

Ray's own schema says what is well formed. The rules beyond it are this platform's: nothing listens beyond loopback
without a token, nothing is open to the world, no credentials lie in a file, and what jobs need is set on every node.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from copernicus.datasets.sensors import InputError

PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_]*>")
MOST_KEYS_SHOWN = 3
LOOPBACK = ("127.0.0.1", "localhost", "::1")
WORLD = ("0.0.0.0/0", "::/0")
TOKEN_FILE = "~/.ray/auth_token"

SECRET_NAME = r"[\w-]*(?:password|passwd|secret_key|secret_access_key|access_key_id|api_key|_token)"
SECRETS = {
    "a password in a URI": r"://[^\s/:@'\"]*:(?![$<*{])[^\s@/'\"]+@",
    "an access key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a token of the hub": r"\bhf_[A-Za-z0-9]{20,}",
    # Not what begins like a variable, a placeholder, a path or a mask.
    "a secret": rf"(?i)\b{SECRET_NAME}['\"]?\s*[:=]\s*['\"]?(?![$<*~/.'\"])[^\s'\"#,;}}]{{4,}}",
}
"""What must not be in a cluster's file, comments included: kind -> pattern."""


class ClusterFileError(InputError):
    """A cluster's file is wrong."""


def is_cluster_file(path: str | Path) -> bool:
    """Whether a YAML is a file of `ray up` or Kubernetes manifests, as opposed to an experiment."""
    import yaml

    try:
        documents = list(yaml.safe_load_all(Path(path).read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return any(
        isinstance(d, dict) and ({"cluster_name", "provider"} & d.keys() or {"apiVersion", "kind"} <= d.keys())
        for d in documents
    )


def check_cluster_file(path: str | Path) -> list[str]:
    """Check a cluster's file; returns what is still to be filled in, a line for each placeholder.

    Raises:
        ClusterFileError: the first thing that is wrong, with the path of its key and the valid choices.
    """
    try:
        text = Path(path).read_text()
    except (OSError, ValueError) as error:
        raise ClusterFileError(f"{path}: cannot be read: {error}") from None
    documents = _parse(path, text)
    _no_secrets(path, text)
    if any({"apiVersion", "kind"} <= d.keys() for d in documents):
        from copernicus.platform.kuberay_files import check_manifests

        check_manifests(path, documents)
    elif len(documents) != 1:
        raise ClusterFileError(f"{path}: `ray up` reads one YAML document, here are {len(documents)}")
    else:
        _check_ray_up(path, documents[0])
    places: dict[str, list[str]] = {}
    for document in documents:
        manifest = f"{document['kind']}: " if "apiVersion" in document else ""
        for key, value in strings(document):
            for name in PLACEHOLDER.findall(value):
                places.setdefault(name, []).append(f"{manifest}{key}")
    return [f"fill in {name} ({_some(list(dict.fromkeys(keys)))})" for name, keys in places.items()]


def installed_ray() -> str:
    """The version of Ray that is installed here, which clusters must have, too."""
    from importlib.metadata import version

    return version("ray")


def wrong(path: str | Path, key: str, message: str) -> ClusterFileError:
    return ClusterFileError(f"{path}: {key}: {message}" if key else f"{path}: {message}")


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a YAML's value, each with the path of its key, as in ``a.b[2].c``."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from strings(item, f"{key}[{i}]")


def check_schema(path: str | Path, value: Any, schema: dict[str, Any], prefix: str = "") -> None:
    """Validate a value by a JSON schema; what is wrong is said in plain words."""
    import jsonschema

    errors = list(jsonschema.Draft7Validator(schema).iter_errors(value))
    if errors:
        # What lies deepest says most: an unknown key, rather than "is not valid under any of the schemas".
        error = max(errors, key=lambda e: len(e.absolute_path))
        key = prefix
        for part in error.absolute_path:
            key += f"[{part}]" if isinstance(part, int) else f"{'.' if key else ''}{part}"
        raise wrong(path, key, _in_words(error))


def _in_words(error: Any) -> str:
    kind, value, given = error.validator, error.validator_value, error.instance
    if kind == "additionalProperties":
        valid = sorted(error.schema.get("properties", {}))
        unknown = sorted(str(k) for k in given if k not in valid)[0]
        close = difflib.get_close_matches(unknown, valid, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {unknown!r}; {hint}valid keys: {', '.join(valid)}"
    if kind == "required":
        missing = [name for name in value if name not in given]
        return f"missing: {', '.join(missing)}"
    if kind == "type":
        types = [value] if isinstance(value, str) else value
        return f"must be of type {' or '.join(types)}, it is {given!r}"
    if kind == "enum":
        return f"no {given!r}; valid choices: {', '.join(map(str, value))}"
    if kind == "minItems":
        return "must not be empty"
    return str(error.message)


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - MOST_KEYS_SHOWN
    return ", ".join(keys[:MOST_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _parse(path: str | Path, text: str) -> list[dict[str, Any]]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML's loader takes the last in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for name, _ in node.value:
                if name.tag != "tag:yaml.org,2002:merge" and name.value in seen:
                    raise ClusterFileError(
                        f"{path}: line {name.start_mark.line + 1}: key {name.value!r} is there twice"
                    )
                seen.add(name.value)
            return super().construct_mapping(node, deep)

    try:
        documents = [d for d in yaml.load_all(text, Loader) if d is not None]
    except yaml.YAMLError as error:
        raise ClusterFileError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from None
    for document in documents:
        if not isinstance(document, dict):
            raise ClusterFileError(f"{path}: must hold keys and values, it holds {type(document).__name__}")
    return documents


def _no_secrets(path: str | Path, text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        for kind, pattern in SECRETS.items():
            if re.search(pattern, line):
                raise wrong(
                    path, f"line {number}",
                    f"{kind} is written here; take it out (and make a new one, if others saw this file): nodes have roles, "
                    f"the token is a file ({TOKEN_FILE}), a database's URI comes from a secret manager or from a file on "
                    "the head",
                )  # fmt: skip


def _check_ray_up(path: str | Path, config: dict[str, Any]) -> None:
    provider = config.get("provider")
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        raise wrong(path, "provider.type", "missing: aws, gcp or local")
    _ray_s_own_rules(path, config)
    local = provider["type"] == "local"
    if TOKEN_FILE not in config.get("file_mounts", {}):
        raise wrong(path, "file_mounts", f"missing: `{TOKEN_FILE}: {TOKEN_FILE}`, the token that all nodes share")
    if not local:
        _check_node_types(path, config)
    if provider["type"] == "aws":
        _check_aws(path, config)
    if provider["type"] == "gcp":
        for name, node in config["available_node_types"].items():
            if not node["node_config"].get("networkInterfaces"):
                raise wrong(
                    path, f"available_node_types.{name}.node_config.networkInterfaces",
                    "missing: name a subnetwork whose firewall lets in SSH from your addresses alone; without it Ray takes the "
                    "project's first network, which may be open to the world",
                )  # fmt: skip
    _check_commands(path, config)


def _ray_s_own_rules(path: str | Path, config: dict[str, Any]) -> None:
    """What `ray up` checks before it asks the cloud for anything; no cloud's library or credentials are needed."""
    import json

    import click
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.providers import _NODE_PROVIDERS
    from ray.autoscaler._private.util import prepare_config, validate_config

    kind = config["provider"]["type"]
    if kind not in _NODE_PROVIDERS:
        raise wrong(path, "provider.type", f"no {kind!r}; valid choices: {', '.join(sorted(_NODE_PROVIDERS))}")
    config = copy.deepcopy(config)
    if kind == "local":
        for name in ("head_node_type", "available_node_types"):
            if name in config:
                raise wrong(
                    path, name, "not with provider local: its nodes are provider.head_ip and provider.worker_ips"
                )
        for name, of in (("head_ip", str), ("worker_ips", list)):
            if not isinstance(config["provider"].get(name), of):
                raise wrong(
                    path,
                    f"provider.{name}",
                    "missing" if name not in config["provider"] else f"must be a {of.__name__}",
                )
        most = len(config["provider"]["worker_ips"])
        for name in ("min_workers", "max_workers"):
            if isinstance(given := config.get(name), int) and given > most:
                raise wrong(path, name, f"is {given}, but there are {most} worker_ips")
    elif kind == "aws" and isinstance(types := config.get("available_node_types"), dict):
        for node in types.values():
            if isinstance(node, dict):
                node.setdefault("resources", {})  # Ray knows them from the instance type
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    check_schema(path, {k: v for k, v in config.items() if not (kind == "local" and k == "min_workers")}, schema)
    if kind != "local" and "available_node_types" not in config:
        raise wrong(path, "available_node_types", "missing: the kinds of nodes, and head_node_type beside it")
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        raise wrong(path, ".".join(map(str, error.absolute_path)), _in_words(error)) from None
    except (ValueError, RuntimeError, click.ClickException) as error:
        raise wrong(path, "", str(error)) from None


def _check_node_types(path: str | Path, config: dict[str, Any]) -> None:
    for name, node in config["available_node_types"].items():
        least, most = node.get("min_workers", 0), node.get("max_workers", config.get("max_workers"))
        if most is not None and least > most:
            raise wrong(
                path, f"available_node_types.{name}.min_workers", f"is {least}, above max_workers, which is {most}"
            )


def _check_aws(path: str | Path, config: dict[str, Any]) -> None:
    for key, value in strings(config["provider"].get("security_group", {}), "provider.security_group"):
        if value in WORLD:
            raise wrong(path, key, f"{value} is the whole world; name your own addresses, such as 203.0.113.7/32")
    for name, node in config["available_node_types"].items():
        key, settings = f"available_node_types.{name}.node_config", node["node_config"]
        interfaces = settings.get("NetworkInterfaces") or [{}]
        if not settings.get("SecurityGroupIds") and not all(i.get("Groups") for i in interfaces):
            raise wrong(
                path, f"{key}.SecurityGroupIds",
                "missing: name a group that lets in SSH from your addresses alone (platform/clusters/aws_stack.template makes "
                "one); the group that Ray makes by itself is open to the whole world at port 22",
            )  # fmt: skip


def _check_commands(path: str | Path, config: dict[str, Any]) -> None:
    storage = {}
    for where in ("head_start_ray_commands", "worker_start_ray_commands"):
        if where not in config:
            raise wrong(
                path,
                where,
                "missing: by Ray's own commands nodes lack the token, and the dashboard listens to the network",
            )
        starting = [(i, command) for i, command in enumerate(config[where]) if re.search(r"\bray start\b", command)]
        if not starting:
            raise wrong(path, where, "no command with `ray start`")
        for i, command in starting:
            key = f"{where}[{i}]"
            before = command[: command.index("ray start")]
            if not re.search(r"\bRAY_AUTH_MODE=token\b", before):
                raise wrong(
                    path, key, "RAY_AUTH_MODE=token is not set before `ray start`: whoever reaches a port may run code"
                )
            found = re.search(r"\bCOPERNICUS_STORAGE=[\"']?([^\s\"';]+)", before)
            if not found:
                raise wrong(
                    path, key, "COPERNICUS_STORAGE=/... is not set before `ray start`: the folder that all nodes share"
                )
            if not found[1].startswith(("/", "<")):
                raise wrong(path, key, f"COPERNICUS_STORAGE must be an absolute path, it is {found[1]!r}")
            storage[where] = found[1]
            host = re.search(r"--dashboard-host[= ]+[\"']?([^\s\"';]+)", command)
            if host and host[1] not in LOOPBACK:
                raise wrong(
                    path, key,
                    f"--dashboard-host={host[1]} opens the dashboard and the job API to the network; valid choices: "
                    f"{', '.join(LOOPBACK)} (clients come through SSH)",
                )  # fmt: skip
            if where.startswith("head") and "--autoscaling-config" not in command:
                raise wrong(
                    path, key, "--autoscaling-config=~/ray_bootstrap_config.yaml is missing: no worker would ever start"
                )
    if len(set(storage.values())) > 1:
        raise wrong(
            path,
            "worker_start_ray_commands",
            f"COPERNICUS_STORAGE differs from the head's: {', '.join(storage.values())}",
        )
    for key, value in strings(config):
        for host in re.findall(r"\bmlflow (?:server|ui)\b.*?--host[= ]+[\"']?([^\s\"';]+)", value):
            if host not in LOOPBACK:
                raise wrong(
                    path, key, f"--host {host} opens MLflow, which knows no token, to the network; take 127.0.0.1"
                )
        _check_ray_version(path, key, value)


def _check_ray_version(path: str | Path, key: str, command: str) -> None:
    here = installed_ray()
    for installing in re.findall(r"pip3? install([^;&|\n]*)", command):
        for requirement in re.findall(r"(?<![\w./-])ray(?:\[[^\]]*\])?(?![\w/-])([^\s\"',]*)", installing):
            if requirement != f"=={here}":
                raise wrong(
                    path, key, f"installs ray{requirement}; the version must be that of the client: ray=={here} (or install "
                    f"{requirement.removeprefix('==') or 'the same'} here)"
                )  # fmt: skip
    for tag in re.findall(r"\brayproject/ray(?:-ml)?:([\w.-]+)", command):
        check_image_tag(path, key, tag)


def check_image_tag(path: str | Path, key: str, tag: str) -> None:
    here = installed_ray()
    if tag != here and not tag.startswith(f"{here}-"):
        raise wrong(path, key, f"the image has Ray {tag.partition('-')[0]}; it must be the client's version, {here}")
