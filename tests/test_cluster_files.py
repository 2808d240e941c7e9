"""Cluster files: every shipped one passes, and each way to get one wrong gives one line that names it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from copernicus.datasets.sensors import InputError
from copernicus.platform.cluster_files import (
    PLACEHOLDER,
    ClusterFileError,
    check_cluster_file,
    installed_ray,
    is_cluster_file,
)

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "platform" / "clusters"
AWS, GCP, OWN = ROOT / "cluster.yaml", CLUSTERS / "gcp.yaml", CLUSTERS / "on_premise.yaml"
RAY_UP = (AWS, GCP, OWN)
KUBE, JOB = CLUSTERS / "kuberay.yaml", CLUSTERS / "kuberay_job.yaml"
SHIPPED = (*RAY_UP, KUBE, JOB)
HERE = installed_ray()


def named(file: Path) -> str:
    return file.name


def written(folder: Path, file: Path, *changes: tuple[str, str]) -> Path:
    """A copy with texts replaced; a text that is not there fails the test."""
    text = file.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (copy := folder / file.name).write_text(text)
    return copy


# ------------------------------------------------------------------------------------------------ what is shipped


@pytest.mark.parametrize("file", SHIPPED, ids=named)
def test_shipped_files_pass_and_their_placeholders_are_listed_with_their_keys(file):
    assert is_cluster_file(file)
    notes = check_cluster_file(file)
    code = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert {n.split()[2] for n in notes} == set(PLACEHOLDER.findall(re.sub(r"\s#.*", "", code)))
    assert all(re.fullmatch(r"fill in <[A-Z_]+> \(.+\)", note) for note in notes)


def test_a_filled_file_leaves_nothing_to_fill_in(tmp_path):
    filled = PLACEHOLDER.sub("filled", AWS.read_text())
    (tmp_path / "cluster.yaml").write_text(filled)
    assert check_cluster_file(tmp_path / "cluster.yaml") == []


def test_few_placeholders_for_a_researcher_with_an_account():
    assert len(check_cluster_file(AWS)) <= 6


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/*.yaml")), ids=named)
def test_experiments_are_no_cluster_files(file):
    assert not is_cluster_file(file)


@pytest.mark.parametrize("file", RAY_UP, ids=named)
def test_shell_commands_are_well_formed(file):
    config = yaml.safe_load(PLACEHOLDER.sub("filled", file.read_text()))
    commands = [c for key, value in config.items() if key.endswith("_commands") for c in value]
    assert len(commands) >= 7
    for command in commands:
        done = subprocess.run(["bash", "-n", "-c", f"source ~/.bashrc && ({command})"], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("file", RAY_UP, ids=named)
def test_what_jobs_rely_on_is_set_where_ray_starts(file, tmp_path):
    """The start commands are run for real, with a `ray` that prints its environment."""
    home = tmp_path / "home"
    programs = home / "copernicus-env" / "bin"
    programs.mkdir(parents=True)
    for name in ("ray", "python", "pip", "sudo", "mountpoint"):
        (programs / name).write_text('#!/bin/bash\nif [ "$1" = start ]; then echo "$@"; env; command -v python; fi\n')
        (programs / name).chmod(0o755)
    text = file.read_text().replace("<ENVIRONMENT>", "~/copernicus-env").replace("<SCRATCH>", str(tmp_path / "scratch"))
    config = yaml.safe_load(PLACEHOLDER.sub("/filled", text))
    environment = {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1"}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = [c for c in config[key] if "ray start" in c]
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        arguments, *variables = done.stdout.splitlines()
        found = dict(v.split("=", 1) for v in variables if "=" in v)
        assert found["RAY_AUTH_MODE"] == "token"
        assert found["COPERNICUS_STORAGE"].startswith("/")
        assert int(found["RAY_gcs_rpc_server_reconnect_timeout_s"]) > 60
        assert found["PATH"].startswith(str(programs)), "python is the environment's"
        if key.startswith("head"):
            assert found["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
            assert "--dashboard-host=127.0.0.1" in arguments
            assert int(found["RAY_health_check_period_ms"]) * int(found["RAY_health_check_failure_threshold"]) > 60_000
            assert (found.get("COPERNICUS_AUTOSCALING") == "1") == (file != OWN)
        else:
            assert "10.0.0.1:6379" in arguments
            assert found.get("COPERNICUS_PREEMPTION") == {AWS: "aws", GCP: "gcp", OWN: None}[file]


def test_the_job_s_cluster_is_the_standing_one_s():
    (standing,) = [d["spec"] for d in yaml.safe_load_all(KUBE.read_text()) if d["kind"] == "RayCluster"]
    assert yaml.safe_load(JOB.read_text())["spec"]["rayClusterSpec"] == standing


def test_the_image_has_the_client_s_ray():
    assert f"FROM rayproject/ray:{HERE}-" in (CLUSTERS / "Dockerfile").read_text()


# ------------------------------------------------------------------------------------------------ what is wrong

LONG = "x" * 48
WRONG = [
    # Ray's own schema and rules
    (AWS, "max_workers: 8\nup", "max_worker: 8\nup", r"unknown key 'max_worker'; did you mean 'max_workers'\?"),
    (AWS, "max_workers: 8\nup", "max_workers: many\nup", r"max_workers: must be of type integer, it is 'many'"),
    (AWS, "  head:\n    #", "  brain:\n    #", r"`head_node_type` must be one of"),
    (AWS, "    max_workers: 2\n", "    most_workers: 2\n", r"available_node_types\.gpu_on_demand: unknown key 'most_workers'"),
    (AWS, "type: aws", "type: amazon", r"provider\.type: no 'amazon'; valid choices: .*aws.*local"),
    (AWS, "cluster_name: copernicus\n", "", r"missing: cluster_name"),
    (AWS, "setup_commands:\n  # A new", "setup_commands: apt-get\n_:\n  # A new", r"unknown key '_'|setup_commands: must be"),
    (AWS, "idle_timeout_minutes: 10", "idle_timeout_minutes: 10\nidle_timeout_minutes: 20", r"line \d+: .*is there twice"),
    (AWS, "provider:\n", "provider: [\n", r"no valid YAML"),
    (GCP, "    resources: {CPU: 24, GPU: 2}\n    min", "    min", r"gpu_on_demand: missing: resources"),
    (OWN, "  worker_ips: [<WORKER_IPS>]", "  workers: []", r"provider\.worker_ips: missing"),
    (OWN, "cluster_name:", "max_workers: 9\ncluster_name:", r"max_workers: is 9, but there are 1 worker_ips"),
    (OWN, "cluster_name:", "available_node_types: {}\ncluster_name:", r"available_node_types: not with provider local"),
    # sizes
    (AWS, "min_workers: 0\n    max_workers: 2", "min_workers: 3\n    max_workers: 2", r"gpu_on_demand\.min_workers: is 3, above"),
    (AWS, "min_workers: 0\n    max_workers: 8", "min_workers: 9\n    max_workers: 9", r"max_workers.*smaller"),
    # closed to the world
    (AWS, "      SecurityGroupIds: [<SECURITY_GROUP>]\n", "", r"head\.node_config\.SecurityGroupIds: missing: .*whole world"),
    (
        AWS, "  cache_stopped", "  security_group: {IpPermissions: [{FromPort: 8265, ToPort: 8265, IpProtocol: tcp, IpRanges: "
        "[{CidrIp: 0.0.0.0/0}]}]}\n  cache_stopped", r"IpPermissions\[0\]\.IpRanges\[0\]\.CidrIp: 0\.0\.0\.0/0 is the whole world",
    ),
    (GCP, "      networkInterfaces: *network\n", "", r"gpu_on_demand\.node_config\.networkInterfaces: missing"),
    (AWS, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", r"head_start_ray_commands\[2\]: --dashboard-host=0\.0\.0\.0"),
    (AWS, "--dashboard-host=127.0.0.1", "--dashboard-host 10.0.0.1", r"opens the dashboard"),
    (
        AWS, "  - ~/copernicus-env/bin/ray stop\n  # Of", "  - mlflow server --port 5000 --host 0.0.0.0\n  # Of",
        r"head_start_ray_commands\[1\]: --host 0\.0\.0\.0 opens MLflow",
    ),
    # the token, the storage
    (AWS, ":$PATH\" RAY_AUTH_MODE=token\n    COPERNICUS_STORAGE=/shared/copernicus COPERNICUS_P", ":$PATH\"\n    COPERNICUS_STORAGE="
     "/shared/copernicus COPERNICUS_P", r"worker_start_ray_commands\[1\]: RAY_AUTH_MODE=token is not set"),
    (OWN, "RAY_AUTH_MODE=token\n", "RAY_AUTH_MODE=disabled\n", r"head_start_ray_commands\[2\]: RAY_AUTH_MODE=token is not set"),
    (AWS, "  ~/.ray/auth_token: ~/.ray/auth_token # of step 2: who has it may run code on the cluster\n", "", r"file_mounts: missing"),
    (AWS, "COPERNICUS_STORAGE=/shared/copernicus COPERNICUS_P", "COPERNICUS_STORAGE=/efs COPERNICUS_P", r"differs from the head's"),
    (AWS, "COPERNICUS_STORAGE=/shared/copernicus COPERNICUS_A", "COPERNICUS_STORAGE=shared COPERNICUS_A", r"absolute path.*'shared'"),
    (AWS, "COPERNICUS_STORAGE=/shared/copernicus COPERNICUS_A", "COPERNICUS_A", r"COPERNICUS_STORAGE=/\.\.\. is not set"),
    (AWS, "    --autoscaling-config=~/ray_bootstrap_config.yaml\n", "", r"no worker would ever start"),
    (AWS, "worker_start_ray_commands:", "metadata:\n  x:", r"worker_start_ray_commands: missing"),
    # versions
    (AWS, f"tune]=={HERE}", "tune]==2.9.0", rf"setup_commands\[6\]: installs ray==2\.9\.0; .*ray=={HERE}"),
    (AWS, f"tune]=={HERE}", "tune]>=2", r"installs ray>=2; the version must be"),
    (OWN, f"\"ray[default,data,train,tune]=={HERE}\"", "ray", r"setup_commands\[2\]: installs ray; the version must be"),
    # secrets; none is repeated in the message
    (AWS, "s3://<BUCKET>", "s3://AKIAIOSFODNN7EXAMPLE", r"line \d+: an access key of AWS is written here"),
    (
        OWN, "COPERNICUS_DATABASE=<DATABASE>", "COPERNICUS_DATABASE=postgresql://mlflow:hunter22@db/mlflow",
        r"line \d+: a password in a URI",
    ),
    (AWS, "# On demand, without", "# password: hunter22, without", r"line \d+: a secret is written here"),
    (AWS, "RAY_AUTH_MODE=token\n    COP", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=hunter22\n    COP", r"line \d+: a secret is written"),
    (AWS, "ulimit -n 65536;", "export HF_TOKEN=hf_hunter22hunter22hunter22;", r"line \d+: a (secret|token of the hub) is written"),
    # Kubernetes
    (KUBE, "enableInTreeAutoscaling", "enableAutoscaling", r"RayCluster copernicus: spec: unknown key 'enableAutoscaling'; did you"),
    (KUBE, f'rayVersion: "{HERE}"', 'rayVersion: "2.9.0"', rf"rayVersion: is 2\.9\.0; it must be the client's version, {HERE}"),
    (KUBE, "authOptions: {mode: token,", "authOptions: {mode: disabled,", r"spec\.authOptions: must be"),
    (KUBE, "  authOptions: {mode: token, secretName: copernicus-token}\n", "", r"spec: missing: authOptions"),
    (KUBE, "  headGroupSpec:", "  headGroupSpec:\n    serviceType: LoadBalancer", r"serviceType: LoadBalancer opens the service"),
    (KUBE, "  headGroupSpec:", "  headGroupSpec:\n    enableIngress: true", r"enableIngress: opens the dashboard"),
    (KUBE, "  selector: {app: copernicus-mlflow}\n  ports", "  type: NodePort\n  ports", r"Service copernicus-mlflow: spec\.type: NodePort"),
    (KUBE, "minReplicas: 0", "minReplicas: 9", r"workerGroupSpecs\[0\]: minReplicas 9 <= replicas 0 <= maxReplicas 8 does not hold"),
    (KUBE, "      replicas: 0\n      minReplicas: 0\n      max", "      replicas: 0\n      max", r"missing: minReplicas"),
    (KUBE, "- groupName: gpu\n      ", "- ", r"workerGroupSpecs\[0\]: missing: groupName"),
    (KUBE, '{num-cpus: "2"}', "{num-cpus: 2}", r"rayStartParams\.num-cpus: must be of type string, it is 2"),
    (KUBE, 'AUTOSCALING, value: "1"}', "AUTOSCALING, value: 1}", r"env\[1\]\.value: must be of type string, it is 1"),
    (KUBE, '{cpu: "8", memory: 32Gi}\n              req', '{cpu: "8"}\n              req', r"resources\.limits: missing: memory"),
    (KUBE, "- name: ray-head\n            image", "- image", r"containers\[0\]: missing: name"),
    (KUBE, "accessModes: [ReadWriteMany]", "accessModes: [ReadWriteOnce]", r"accessModes: must hold ReadWriteMany, .*ReadWriteOnce"),
    (KUBE, "{name: COPERNICUS_STORAGE, value: /shared}\n              - {name: COPERNICUS_A", "{name: COPERNICUS_A", r"COPERNICUS_STORAGE"),
    (KUBE, "{name: scratch, mountPath", "{name: disk, mountPath", r"volumeMounts: no volume 'disk'; valid choices: scratch, storage"),
    (KUBE, '- {name: MLFLOW_DISABLE_TELEMETRY, value: "true"}', "- {name: DB_PASSWORD, value: abc}", r"DB_PASSWORD must come from a Secret"),
    (KUBE, "<IMAGE>", "rayproject/ray:2.9.0-py311", rf"the image has Ray 2\.9\.0; it must be the client's version, {HERE}"),
    (KUBE, "kind: RayCluster", "kind: Secret", r"Secret copernicus: secrets are in no file"),
    (KUBE, "apiVersion: ray.io/v1\n", "apiVersion: ray.io/v1alpha1\n", r"RayCluster copernicus: apiVersion: must be ray\.io/v1, it is"),
    (KUBE, "kind: RayCluster\nmetadata:\n  name: copernicus", f"kind: RayCluster\nmetadata:\n  name: {LONG}", r"47 at most"),
    (JOB, "  rayClusterSpec:", "  clusterSelector: {ray.io/cluster: x}\n  rayClusterSpec:", r"give one of rayClusterSpec and"),
    (JOB, "  entrypoint: bash", "  # bash", r"RayJob copernicus-: spec\.entrypoint: missing"),
    (JOB, "  shutdownAfterJobFinishes: true", "  submissionMode: Email", r"submissionMode: no 'Email'; valid choices: K8sJobMode"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "message"), WRONG, ids=[f"{w[0].stem}-{i}" for i, w in enumerate(WRONG)]
)
def test_one_clear_line_for_each_fault(file, old, new, message, tmp_path):
    copy = written(tmp_path, file, (old, new))
    with pytest.raises(ClusterFileError) as caught:
        check_cluster_file(copy)
    said = str(caught.value)
    assert re.search(message, said), said
    assert said.startswith(f"{copy}: ")
    assert "\n" not in said
    assert not re.search("hunter22|AKIA", said), "a secret is not repeated"


@pytest.mark.parametrize(
    "text",
    [
        "COPERNICUS_DATABASE=postgresql+psycopg2://$USER:$PASSWORD@db/mlflow",
        "postgresql://<USER>:<PASSWORD>@db/mlflow",
        'TOKEN="$(aws secretsmanager get-secret-value --secret-id x)"',
        "kubectl create secret generic t --from-file=auth_token=$HOME/.ray/auth_token",
        "https://example.org:8080/path",
        "the token: who has it may run code",
    ],
)
def test_what_only_names_a_secret_is_no_secret(text, tmp_path):
    check_cluster_file(written(tmp_path, AWS, ("# On demand, without", f"# {text}")))


@pytest.mark.parametrize(
    "text", ["", "- 1\n", "a: 1\n---\nb: 2\n", "cluster_name: x\n", "provider: aws\n", "apiVersion: v1\nkind: 3\n"]
)
def test_what_is_hardly_a_file_is_refused_plainly(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError):
        check_cluster_file(tmp_path / "x.yaml")


def test_check_takes_clusters_beside_experiments(tmp_path, capsys):
    from copernicus.platform.cli import main

    def check(*files: Path) -> tuple[int, str, str]:
        arguments, sys.argv = sys.argv, ["copernicus", "check", "-q", *map(str, files)]
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            sys.argv = arguments
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    code, out, err = check(AWS, KUBE, ROOT / "experiments" / "quickstart.yaml")
    assert (code, err) == (0, "")
    assert f"ok {AWS} (cluster, a template: 6 placeholders are left)" in out
    assert "fill in <BUCKET> (head_start_ray_commands[0])" in out
    assert "quickstart.yaml (pipeline" in out
    code, out, err = check(written(tmp_path, AWS, ("=127.0.0.1 ", "=0.0.0.0 ")), KUBE)
    assert code == 2
    assert "kuberay.yaml (cluster" in out
    assert err.count("error:") == 1


# ------------------------------------------------------------------------------------------------ the whole of AWS


@pytest.mark.slow
def test_on_aws_ray_starts_closed_nodes_with_roles_from_the_stack(tmp_path, monkeypatch):
    """The stack is made and Ray launches a node of each type, on moto's AWS."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps its key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with moto.mock_aws():
        ec2, formation = boto3.client("ec2"), boto3.client("cloudformation")
        image = ec2.describe_images()["Images"][0]["ImageId"]
        boto3.client("ssm").put_parameter(Name="/test/image", Type="String", Value=image)
        subnet = ec2.describe_subnets()["Subnets"][0]
        given = {
            "SshCidr": "203.0.113.7/32",
            "Vpc": subnet["VpcId"],
            "Subnet": subnet["SubnetId"],
            "DataBucket": "shards",
        }
        template = re.sub(r"/aws/service/\S+", "/test/image", (CLUSTERS / "aws_stack.template").read_text())
        formation.create_stack(
            StackName="copernicus", TemplateBody=template, Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in given.items()],
        )  # fmt: skip
        (stack,) = formation.describe_stacks(StackName="copernicus")["Stacks"]
        values = {o["OutputKey"]: o["OutputValue"] for o in stack["Outputs"]}
        (group,) = ec2.describe_security_groups(GroupIds=[values["SecurityGroup"]])["SecurityGroups"]
        iam = boto3.client("iam")
        (policy,) = iam.list_policies(Scope="Local")["Policies"]
        document = iam.get_policy_version(PolicyArn=policy["Arn"], VersionId=policy["DefaultVersionId"])[
            "PolicyVersion"
        ]
        readable = [r for s in document["Document"]["Statement"] for r in s["Resource"] if "shards" in r]
        groups_before = {g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"]}
        fills = [(f"<{re.sub('(?<=[a-z])(?=[A-Z])', '_', k).upper()}>", v) for k, v in values.items()]
        filled = written(tmp_path, AWS, *fills)
        assert check_cluster_file(filled) == []

        config = prepare_config(yaml.safe_load(filled.read_text()))
        config = AWSNodeProvider.fillout_available_node_types_resources(config)
        validate_config(config)
        config = AWSNodeProvider.bootstrap_config(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node in config["available_node_types"].items():
            tags = {
                "ray-node-name": name,
                "ray-user-node-type": name,
                "ray-node-type": "worker",
                "ray-launch-config": "x",
            }
            provider.create_node(node["node_config"], tags, 1)
        instances = {
            next(t["Value"] for t in i["Tags"] if t["Key"] == "ray-user-node-type"): i
            for r in ec2.describe_instances()["Reservations"]
            for i in r["Instances"]
        }
        groups_after = {g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"]}

    world = [r for p in group["IpPermissions"] for r in (*p.get("IpRanges", []), *p.get("Ipv6Ranges", []))]
    assert world == [{"CidrIp": "203.0.113.7/32"}], "one way in from outside"
    assert [p["FromPort"] for p in group["IpPermissions"] if p.get("IpRanges")] == [22]
    assert [g["GroupId"] for p in group["IpPermissions"] for g in p.get("UserIdGroupPairs", [])] == [group["GroupId"]]
    assert groups_after == groups_before, "Ray made no group of its own, which would be open to the world"
    assert sorted(readable) == ["arn:aws:s3:::shards", "arn:aws:s3:::shards/*"]
    assert instances.keys() == {"head", "gpu_on_demand", "gpu_spot"}
    for name, instance in instances.items():
        assert [g["GroupId"] for g in instance["SecurityGroups"]] == [group["GroupId"]]
        role = "copernicus-head" if name == "head" else "copernicus-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(role)
        assert (instance.get("InstanceLifecycle") == "spot") == (name == "gpu_spot")
        assert instance["ImageId"] == image
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 2}
    assert types["gpu_spot"]["resources"]["GPU"] == types["gpu_on_demand"]["resources"]["GPU"] == 4


def test_the_stack_s_policies_let_workers_do_no_more_than_read_and_write_data():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))
    Loader.add_constructor("!If", lambda loader, node: loader.construct_sequence(node, deep=True)[1])
    resources = yaml.load((CLUSTERS / "aws_stack.template").read_text(), Loader)["Resources"]
    assert resources["WorkerRole"]["Properties"].keys() == {"RoleName", "AssumeRolePolicyDocument", "ManagedPolicyArns"}
    actions = {a for s in resources["Data"]["Properties"]["PolicyDocument"]["Statement"] for a in s["Action"]}
    assert all(a.startswith("s3:") and "*" not in a for a in actions)
    (autoscaler,) = resources["HeadRole"]["Properties"]["Policies"]
    changing = {"ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances", "ec2:CreateTags", "ec2:DeleteTags"}
    for statement in autoscaler["PolicyDocument"]["Statement"]:
        given = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert "Condition" in statement or not changing & set(given), (
            "instances that are not the cluster's are left alone"
        )
    assert not re.search(r"(?<!\w)[*&]\w", (CLUSTERS / "aws_stack.template").read_text()), (
        "CloudFormation knows no aliases"
    )
