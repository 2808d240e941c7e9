"""Kubernetes manifests of a Ray cluster (KubeRay 1.6 or newer): what the operator or Kubernetes would refuse, and the
platform's own rules. Fields are those of KubeRay's custom resources (ray.io/v1)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from copernicus.platform.cluster_files import SECRET_NAME, check_image_tag, check_schema, installed_ray, wrong

API_VERSIONS = {
    "RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "PersistentVolumeClaim": "v1", "Service": "v1", "Deployment": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1", "ServiceAccount": "v1", "ConfigMap": "v1",
}  # fmt: skip
LONGEST_NAME = 47
"""Characters of a RayCluster's or RayJob's name: Kubernetes adds its own to them."""


def _object(required: tuple[str, ...] = (), open_: bool = False, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": open_,
    }


def _list(items: Any, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


ANY: dict[str, Any] = {}
TEXT, WHOLE, YES = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNTS = _object(("cpu", "memory"), open_=True)
CONTAINER = _object(
    ("name", "image", "resources"),
    name=TEXT, image=TEXT, imagePullPolicy=TEXT, command=_list(TEXT), args=_list(TEXT), workingDir=TEXT,
    env=_list(_object(("name",), name=TEXT, value=TEXT, valueFrom={"type": "object"})), envFrom=_list(ANY),
    ports=_list(_object(("containerPort",), open_=True, containerPort=WHOLE)),
    resources=_object(("limits",), limits=AMOUNTS, requests={"type": "object"}, claims=ANY),
    volumeMounts=_list(_object(("name", "mountPath"), open_=True, name=TEXT, mountPath=TEXT)), volumeDevices=ANY,
    lifecycle=ANY, livenessProbe=ANY, readinessProbe=ANY, startupProbe=ANY, securityContext=ANY, restartPolicy=TEXT,
    resizePolicy=ANY, stdin=YES, stdinOnce=YES, tty=YES, terminationMessagePath=TEXT, terminationMessagePolicy=TEXT,
)  # fmt: skip
POD = _object(
    ("spec",),
    metadata={"type": "object"},
    spec=_object(
        ("containers",), True, containers=_list(CONTAINER, 1), volumes=_list(_object(("name",), True, name=TEXT))
    ),
)
RAY_CLUSTER = _object(
    ("headGroupSpec", "rayVersion", "authOptions"),
    rayVersion=TEXT, suspend=YES, managedBy=TEXT, headServiceAnnotations=TEXTS, enableInTreeAutoscaling=YES,
    authOptions=_object(("mode",), mode={"enum": ["token", "disabled"]}, secretName=TEXT, enableK8sTokenAuth=YES),
    autoscalerOptions=_object(
        version={"enum": ["v1", "v2"]}, resources=ANY, image=TEXT, imagePullPolicy=TEXT, securityContext=ANY,
        idleTimeoutSeconds=WHOLE, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, env=ANY, envFrom=ANY,
        volumeMounts=ANY,
    ),
    gcsFaultToleranceOptions={"type": "object"}, upgradeStrategy={"type": "object"},
    headGroupSpec=_object(
        ("template",),
        template=POD, headService=ANY, enableIngress=YES, rayStartParams=TEXTS, serviceType=TEXT, resources=TEXTS, labels=TEXTS,
    ),
    workerGroupSpecs=_list(_object(
        ("groupName", "template", "minReplicas", "maxReplicas"),
        groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, idleTimeoutSeconds=WHOLE, numOfHosts=WHOLE,
        rayStartParams=TEXTS, template=POD, scaleStrategy=ANY, suspend=YES, resources=TEXTS, labels=TEXTS,
    )),
)  # fmt: skip
MODES = ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
RAY_JOB = _object(
    entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT, metadata=TEXTS, suspend=YES, managedBy=TEXT, clusterSelector=TEXTS,
    rayClusterSpec=RAY_CLUSTER, submissionMode={"enum": MODES}, submitterPodTemplate=POD, submitterConfig={"type": "object"},
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=TEXT,
    shutdownAfterJobFinishes=YES, ttlSecondsAfterFinished=WHOLE, activeDeadlineSeconds=WHOLE, backoffLimit=WHOLE,
    deletionStrategy=ANY, preRunningDeadlineSeconds=WHOLE,
)  # fmt: skip
SPECS = {
    "RayCluster": RAY_CLUSTER,
    "RayJob": RAY_JOB,
    "Deployment": _object(("selector", "template"), True, template=POD, replicas=WHOLE),
    "Service": _object(("ports",), True, ports=_list(ANY, 1), type=TEXT, selector=TEXTS),
    "PersistentVolumeClaim": _object(("accessModes", "resources"), True, accessModes=_list(TEXT, 1)),
    "NetworkPolicy": _object(("podSelector",), True),
}


def check_manifests(path: str | Path, documents: list[dict[str, Any]]) -> None:
    """Check Kubernetes manifests.

    Raises:
        ClusterFileError: the first thing that is wrong: document, path of the key, valid choices.
    """
    claims: dict[str, list[str]] = {}
    clusters: list[tuple[str, dict[str, Any]]] = []
    for i, document in enumerate(documents):
        kind, metadata = document.get("kind"), document.get("metadata")
        names = metadata if isinstance(metadata, dict) else {}
        name = names.get("name") or names.get("generateName")
        if not isinstance(kind, str) or not isinstance(name, str):
            raise wrong(path, f"document {i + 1}", "kind and metadata.name must be there")
        here = f"{kind} {name}"
        if kind == "Secret":
            raise wrong(path, here, "secrets are in no file: kubectl create secret generic NAME --from-file=KEY=FILE")
        if kind in ("Ingress", "HTTPRoute", "Route"):
            raise wrong(
                path, here, "opens what is inside to the outside; take it out: kubectl port-forward reaches services"
            )
        version = API_VERSIONS.get(kind)
        if version and document.get("apiVersion") != version:
            raise wrong(path, f"{here}: apiVersion", f"must be {version}, it is {document.get('apiVersion')}")
        if kind in SPECS:
            if "spec" not in document:
                raise wrong(path, here, "missing: spec")
            check_schema(path, document["spec"], SPECS[kind], f"{here}: spec")
        spec = document.get("spec", {})
        if kind == "PersistentVolumeClaim":
            claims[name] = spec["accessModes"]
        elif kind == "Service":
            _no_way_in(path, f"{here}: spec.type", spec.get("type"))
        elif kind == "Deployment":
            _check_pod(path, f"{here}: spec.template", spec["template"])
        elif kind in ("RayCluster", "RayJob"):
            if len(name) > LONGEST_NAME or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9-])?", name):
                raise wrong(path, f"{here}: metadata.name", f"small letters, digits and '-', {LONGEST_NAME} at most")
            if kind == "RayJob":
                _check_job(path, here, spec)
                if "rayClusterSpec" in spec:
                    clusters.append((f"{here}: spec.rayClusterSpec", spec["rayClusterSpec"]))
            else:
                clusters.append((f"{here}: spec", spec))
    for key, cluster in clusters:
        _check_cluster(path, key, cluster, claims)


def _check_job(path: str | Path, here: str, spec: dict[str, Any]) -> None:
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        raise wrong(path, f"{here}: spec", "give one of rayClusterSpec and clusterSelector")
    if not spec.get("entrypoint") and spec.get("submissionMode") != "InteractiveMode":
        raise wrong(path, f"{here}: spec.entrypoint", "missing: the command of the job")
    if "submitterPodTemplate" in spec:
        _check_pod(path, f"{here}: spec.submitterPodTemplate", spec["submitterPodTemplate"])


def _check_cluster(path: str | Path, key: str, spec: dict[str, Any], claims: dict[str, list[str]]) -> None:
    if spec["rayVersion"] != installed_ray():
        raise wrong(
            path, f"{key}.rayVersion", f"is {spec['rayVersion']}; it must be the client's version, {installed_ray()}"
        )
    if spec["authOptions"]["mode"] != "token" or not spec["authOptions"].get("secretName"):
        raise wrong(
            path,
            f"{key}.authOptions",
            "must be {mode: token, secretName: NAME}: else whoever reaches a port may run code",
        )
    head = spec["headGroupSpec"]
    _no_way_in(path, f"{key}.headGroupSpec.serviceType", head.get("serviceType"))
    service = head.get("headService") or {}
    _no_way_in(path, f"{key}.headGroupSpec.headService.spec.type", (service.get("spec") or {}).get("type"))
    if head.get("enableIngress"):
        raise wrong(
            path,
            f"{key}.headGroupSpec.enableIngress",
            "opens the dashboard to the outside; kubectl port-forward reaches it",
        )
    groups = [(f"{key}.headGroupSpec.template", head["template"])]
    for i, group in enumerate(spec.get("workerGroupSpecs", [])):
        where = f"{key}.workerGroupSpecs[{i}]"
        least, most = group["minReplicas"], group["maxReplicas"]
        if not least <= group.get("replicas", least) <= most:
            raise wrong(
                path,
                where,
                f"minReplicas {least} <= replicas {group.get('replicas', least)} <= maxReplicas {most} does not hold",
            )
        groups.append((f"{where}.template", group["template"]))
    storage = set()
    for where, pod in groups:
        _check_pod(path, where, pod)
        storage.add(_storage(path, where, pod["spec"], claims))
    if len(storage) > 1:
        raise wrong(path, key, f"COPERNICUS_STORAGE is not the same in all groups: {', '.join(sorted(storage))}")


def _storage(path: str | Path, where: str, pod: dict[str, Any], claims: dict[str, list[str]]) -> str:
    """The shared folder of a group's pods: it must lie on a volume that all of them can write to."""
    ray = pod["containers"][0]  # KubeRay takes the first container for Ray's
    values = [e.get("value", "") for e in ray.get("env", []) if e["name"] == "COPERNICUS_STORAGE"]
    if not values or not values[0].startswith("/"):
        raise wrong(
            path,
            f"{where}.spec.containers[0].env",
            "COPERNICUS_STORAGE must be set, to the absolute path of the shared folder",
        )
    of_claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"]
        for v in pod.get("volumes", [])
        if "persistentVolumeClaim" in v
    }
    for mount in ray.get("volumeMounts", []):
        if mount["name"] in of_claims and f"{values[0]}/".startswith(mount["mountPath"].rstrip("/") + "/"):
            modes = claims.get(of_claims[mount["name"]], ["ReadWriteMany"])  # a claim of another file is taken as it is
            if "ReadWriteMany" not in modes:
                raise wrong(
                    path, f"PersistentVolumeClaim {of_claims[mount['name']]}: spec.accessModes",
                    f"must hold ReadWriteMany, since pods on several nodes write to it; it is {', '.join(modes)}",
                )  # fmt: skip
            return values[0]
    raise wrong(
        path, f"{where}.spec.containers[0].volumeMounts", f"no volume of a persistentVolumeClaim at {values[0]}"
    )


def _check_pod(path: str | Path, where: str, pod: dict[str, Any]) -> None:
    volumes = {v["name"] for v in pod["spec"].get("volumes", [])}
    for i, container in enumerate(pod["spec"]["containers"]):
        key = f"{where}.spec.containers[{i}]"
        repository, _, tag = container["image"].rpartition(":")
        if repository.endswith("rayproject/ray"):
            check_image_tag(path, f"{key}.image", tag)
        for j, variable in enumerate(container.get("env", [])):
            if re.fullmatch(SECRET_NAME, variable["name"], re.IGNORECASE) and "value" in variable:
                raise wrong(
                    path, f"{key}.env[{j}]", f"{variable['name']} must come from a Secret (valueFrom.secretKeyRef)"
                )
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                raise wrong(
                    path,
                    f"{key}.volumeMounts",
                    f"no volume {mount['name']!r}; valid choices: {', '.join(sorted(volumes))}",
                )


def _no_way_in(path: str | Path, key: str, kind: str | None) -> None:
    if kind not in (None, "ClusterIP"):
        raise wrong(
            path, key, f"{kind} opens the service to the outside; take ClusterIP: kubectl port-forward reaches it"
        )
