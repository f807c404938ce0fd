"""The files in `cluster/`, read by those who will read them: Ray's launcher, its autoscaler, its `ray start`.

No cluster is started, and no cloud asked: what only a cloud can refuse (an image, a machine type) is not seen here.
"""

import copy
import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers.kuberay import KINDS
from ray.autoscaler import _private as autoscaler
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from ftray.cli import parse
from ftray.config import Config
from ftray.search.space import load_space

REPOSITORY = Path(__file__).parent.parent
CLUSTER = REPOSITORY / "cluster"
CLOUDS = ["aws", "gcp", "azure"]
LAUNCHED = [*CLOUDS, "onprem", "local"]
KUBERAY = ["kuberay-cluster", "kuberay-job", "rayservice"]
SEARCHED = ["kuberay-cluster", "kuberay-job"]
SCALING = [*CLOUDS, *SEARCHED]


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` has it: what the file leaves out comes from Ray's defaults, then Ray's schema is applied."""
    if config["provider"]["type"] != "fake_multinode":  # of which Ray's wheel has no defaults
        config = prepare_config(config)
    validate_config(config)
    return config


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


def check(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, KINDS[manifest["kind"]])


def ray_cluster(name: str) -> dict[str, Any]:
    """The specification of the cluster that a manifest makes."""
    spec = manifests(name)[-1]["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def autoscaled(name: str) -> dict[str, Any]:
    """What the autoscaler makes of a file: of a launcher's, or of a manifest as KubeRay hands it on."""
    if name not in SEARCHED:
        return prepared(load(name))
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": name, "namespace": "default"}, "spec": ray_cluster(name)}
    )


def groups(name: str) -> list[dict[str, Any]]:
    cluster = ray_cluster(name)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def start_arguments(command: str) -> dict[str, Any]:
    """The options of a `ray start`, parsed by Ray itself."""
    words = shlex.split(command)
    assert words[:2] == ["ray", "start"]
    return start.make_context("ray start", words[2:]).params


@pytest.mark.parametrize("name", LAUNCHED)
def test_launcher_files_fit_rays_schema(name):
    config = prepared(load(name))
    assert config["cluster_name"] == "ftray"
    assert 0 < config["idle_timeout_minutes"] <= 10
    known = json.loads((Path(autoscaler.__file__).parents[1] / "ray-schema.json").read_text())["properties"]["provider"]
    fake = {"use_node_id_as_ip", "disable_launch_config_check"}
    assert load(name)["provider"].keys() <= known["properties"].keys() | (fake if name == "local" else set())


@pytest.mark.parametrize("name", SCALING)
def test_trials_bring_gpu_machines_and_nothing_else_does(name):
    config = autoscaled(name)
    types, head = config["available_node_types"], config["head_node_type"]
    assert types[head]["resources"]["CPU"] == 0
    assert types[head]["max_workers"] == 0
    cpu, gpu = types["cpu"], types["gpu"]
    assert (cpu["min_workers"], gpu["min_workers"]) == (1, 0)
    assert gpu["max_workers"] >= 1
    assert config["max_workers"] == cpu["max_workers"] + gpu["max_workers"]
    assert config["idle_timeout_minutes"] == 10

    def machines_for(**ask: float) -> dict[str, int]:
        scorer = partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
        wanted, unmet = get_nodes_for(types, {head: 1, "cpu": 1}, head, 6, [ask], scorer)
        assert not unmet
        return dict(wanted)

    assert machines_for(CPU=1) == {"cpu": 1}
    assert machines_for(CPU=1, GPU=1) == {"gpu": 1}
    assert machines_for(CPU=cpu["resources"]["CPU"], GPU=1) == {"gpu": 1}  # see `on_hardware`


def test_on_premise_hosts_all_join():
    (hosts,) = prepared(load("onprem"))["available_node_types"].values()
    assert hosts["min_workers"] == hosts["max_workers"] == len(load("onprem")["provider"]["worker_ips"])


def test_one_machine_grows_by_cpu_nodes():
    config = prepared(load("local"))
    types = config["available_node_types"]
    assert config["head_node_type"] == FAKE_HEAD_NODE_TYPE
    assert types[FAKE_HEAD_NODE_TYPE]["resources"] == {"CPU": 0}
    assert types["cpu"]["min_workers"] < types["cpu"]["max_workers"]
    text = (CLUSTER / "local.yaml").read_text()
    with_gpu = yaml.safe_load(re.sub(r"^  # (gpu:.*|  \w.*)$", r"  \1", text, flags=re.MULTILINE))
    assert prepared(with_gpu)["available_node_types"]["gpu"]["resources"]["GPU"] == 1
    command = re.search(r"ray start .*\\\n#.*", text)
    assert command is not None
    safe(start_arguments(command[0].replace("\\\n#", "")))


def safe(head: dict[str, Any]) -> None:
    """A head that runs no trials and whose dashboard no other machine sees."""
    assert head["head"]
    assert head["num_cpus"] == 0
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["metrics_export_port"] == 8080


@pytest.mark.parametrize("name", [*CLOUDS, "onprem"])
def test_start_commands(name):
    config = prepared(load(name))
    *_, command = config["head_start_ray_commands"]
    head = start_arguments(command)
    safe(head)
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"  # where the launcher puts it
    *_, command = config["worker_start_ray_commands"]
    worker = start_arguments(command)
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert worker["metrics_export_port"] == 8080
    assert worker["object_manager_port"] == head["object_manager_port"]


def test_azure_machines_have_only_parameters_of_rays_template():
    template = json.loads((Path(autoscaler.__file__).parent / "_azure" / "azure-vm-template.json").read_text())
    for machine in load("azure")["available_node_types"].values():
        assert machine["node_config"]["azure_arm_parameters"].keys() <= template["parameters"].keys()


def test_only_gpu_machines_are_spot():
    spot = {
        "aws": lambda node: node.get("InstanceMarketOptions") == {"MarketType": "spot"},
        "gcp": lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
        "azure": lambda node: node["azure_arm_parameters"].get("priority") == "Spot",
    }
    for cloud, of in spot.items():
        machines = load(cloud)["available_node_types"]
        assert {name for name, machine in machines.items() if of(machine["node_config"])} == {"gpu"}
    for name in SEARCHED:
        assert [bool(group["template"]["spec"].get("nodeSelector")) for group in groups(name)] == [False, False, True]


@pytest.mark.parametrize("name", KUBERAY)
def test_manifests_fit_kuberays_api(name):
    for manifest in manifests(name):
        check(manifest)
    for group in groups(name):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        arguments = "".join(f" --{flag}={value}" for flag, value in group["rayStartParams"].items())
        start_arguments("ray start" + arguments)


@pytest.mark.parametrize("name", SEARCHED)
def test_pods_of_a_search(name):
    head, *workers = groups(name)
    assert ray_cluster(name)["enableInTreeAutoscaling"]
    assert ray_cluster(name)["authOptions"] == {"mode": "token"}  # for dashboard-host 0.0.0.0
    for group in (head, *workers):
        assert group["rayStartParams"]["metrics-export-port"] == "8080"
        assert group["template"]["spec"]["containers"][0]["ports"] == [{"name": "metrics", "containerPort": 8080}]
    for group in workers:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]  # Kubernetes wants this of GPUs; Ray counts the limits
        assert group["replicas"] == group["minReplicas"]


def test_the_job_runs_its_configuration_on_the_cluster_of_the_other_file():
    config_map, job = manifests("kuberay-job")
    cluster = copy.deepcopy(job["spec"]["rayClusterSpec"])
    pod = cluster["headGroupSpec"]["template"]["spec"]
    mount, volume = pod["containers"][0]["volumeMounts"].pop(), pod["volumes"].pop()
    assert cluster == manifests("kuberay-cluster")[0]["spec"]
    assert volume == {"name": mount["name"], "configMap": {"name": config_map["metadata"]["name"]}}

    python, flag, module, option, path, again = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag, option, again) == ("python", "-m", "--config", "--resume")
    assert job["spec"]["backoffLimit"] > 0  # the same command, after a lost head
    assert importlib.util.find_spec(module) is not None
    ((file, text),) = config_map["data"].items()
    assert path == f"{mount['mountPath']}/{file}"
    config = Config.model_validate(yaml.safe_load(text))
    assert config.scaling.gpus_per_worker == 1
    assert load_space(config.search.space).methods


def misspell(parent: dict[str, Any], field: str) -> None:
    parent[field + "s"] = parent.pop(field)


@pytest.mark.parametrize(
    ("breaks", "complaint"),
    [
        (lambda c: c["workerGroupSpecs"][1].update(maxReplicas="many"), "'many' is not of type 'integer'"),
        (lambda c: c["workerGroupSpecs"][1].pop("minReplicas"), "'minReplicas' is a required property"),
        (lambda c: misspell(c["workerGroupSpecs"][1], "replicas"), "'replicass' was unexpected"),
        (lambda c: misspell(c, "autoscalerOptions"), "'autoscalerOptionss' was unexpected"),
        (lambda c: c["autoscalerOptions"].update(upscalingMode="Fast"), "'Fast' is not one of"),
        (lambda c: c["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "0 is not of type 'string'"),
        (lambda c: misspell(c["headGroupSpec"]["template"]["spec"], "volumes"), "'volumess' was unexpected"),
        (
            lambda c: c["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"].update(cpu="two"),
            "'two' does not match",
        ),
        (lambda c: c.pop("headGroupSpec"), "'headGroupSpec' is a required property"),
    ],
)
def test_a_broken_manifest_is_refused(breaks: Callable[[dict[str, Any]], Any], complaint):
    manifest = json.loads(json.dumps(manifests("kuberay-cluster")[0]))  # no parts shared, as YAML's anchors make them
    check(manifest)
    breaks(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError) as refusal:
        check(manifest)
    assert complaint in refusal.value.message


@pytest.mark.parametrize("name", KUBERAY)
def test_rays_version_is_the_one_of_the_image(name):
    pinned = re.search(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert ray_cluster(name)["rayVersion"] == pinned[1]


def test_files_that_are_named_exist():
    for file in (path for path in CLUSTER.rglob("*") if path.is_file()):
        named = re.findall(r"\b(?:cluster|examples|docs)/[\w.-]+\w", file.read_text())
        assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_dockerfile_makes_the_image_that_is_named_from_files_that_exist():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    copied = [shlex.split(line)[1:-1] for line in re.findall(r"^COPY .*$", dockerfile, re.MULTILINE)]
    sources = {source for sources in copied for source in sources}
    assert {"ftray", "search_spaces", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == sources
    assert all((REPOSITORY / source).exists() for source in sources)
    assert re.search(r"^RUN .*--constraint constraints.txt \"\.\[serve\]\"$", dockerfile, re.MULTILINE)
    (image,) = re.findall(r"docker build --file cluster/Dockerfile --tag (\S+) \.", dockerfile)
    named = {load(name)["docker"]["image"] for name in [*CLOUDS, "onprem"]}
    named |= {group["template"]["spec"]["containers"][0]["image"] for name in KUBERAY for group in groups(name)}
    assert named == {image}
    (user,) = re.findall(r"useradd --create-home --uid (\d+) ", dockerfile)
    assert {
        group["template"]["spec"]["securityContext"]["runAsUser"] for name in SEARCHED for group in groups(name)
    } == {int(user)}
    for name in CLOUDS:
        assert any(f"chown {user} /shared" in command for command in load(name)["initialization_commands"])


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay-cluster"])
def test_the_search_in_the_comments_is_one_that_the_command_takes(name, monkeypatch):
    monkeypatch.setenv("PWD", str(REPOSITORY))
    text = (CLUSTER / f"{name}.yaml").read_text().replace("$PWD", str(REPOSITORY))
    (command,) = re.findall(r"-- python -m ftray\.tune((?:.*\\\n#)*.*)", text)
    config = parse("tune", shlex.split(command.replace("\\\n#", "")))
    assert config.output.startswith("/")  # the job has a directory of its own
    asks = config.scaling.gpus_per_worker
    assert asks == (None if name in ("onprem", "local") else 1)


def test_the_grafana_dashboard_asks_for_metrics_that_there_are():
    sources = [(REPOSITORY / "ftray" / "search" / name).read_text() for name in ("metrics.py", "pack_metrics.py")]
    made = set(re.findall(r'"(ftray_\w+)"', "".join(sources)))
    dashboard = json.loads((CLUSTER / "observability" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert {name for expression in asked for name in re.findall(r"ray_(ftray_\w+)", expression)} == made
    runbook = (REPOSITORY / "docs" / "operations.md").read_text()
    assert set(re.findall(r"`ray_(ftray_\w+)`", runbook)) == made
