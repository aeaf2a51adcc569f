import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deployment import DEPLOY, document, documents, parse_command, settings_of_conf

from broker_fl.config import load_settings

FOLDER = DEPLOY / "kubernetes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
KUBERNETES = ("1.31", kubernetes_validate.latest_version())
CUSTOM = {"rabbitmq.com/v1beta1", "monitoring.coreos.com/v1"}
"""Of operators, whose schemas are not Kubernetes' own."""

MOST_CONFIG_CHARACTERS = 2000
"""Of additionalConfig: the Cluster Operator's limit."""


def _generated(folder: Path) -> list[dict[str, Any]]:
    """The config maps of a folder's kustomization, as kustomize makes them."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": entry["name"], **entry.get("options", {})},
            "data": {Path(file).name: (folder / file).read_text(encoding="utf-8") for file in entry["files"]},
        }
        for entry in document(folder / "kustomization.yaml")["configMapGenerator"]
    ]


def _objects() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for resource in document(FOLDER / "kustomization.yaml")["resources"]:
        path = (FOLDER / resource).resolve()
        found += _generated(path) if path.is_dir() else documents(path)
    return found


OBJECTS = _objects()
BY_NAME = {(one["kind"], one["metadata"]["name"]): one for one in OBJECTS}
RABBITMQ = BY_NAME["RabbitmqCluster", "rabbitmq"]
RABBITMQ_LABELS = {"app.kubernetes.io/name": "rabbitmq", "app.kubernetes.io/component": "rabbitmq"}
"""That the Cluster Operator gives to its pods and services."""


def _templates() -> dict[str, dict[str, Any]]:
    """Pods of ours, by name."""
    return {one["metadata"]["name"]: one["spec"]["template"] for one in OBJECTS if one["kind"] in ("Deployment", "StatefulSet")}


TEMPLATES = _templates()
RABBITMQ_POD = RABBITMQ["spec"]["override"]["statefulSet"]["spec"]["template"]["spec"]
PODS = {**{name: template["spec"] for name, template in TEMPLATES.items()}, "rabbitmq": RABBITMQ_POD}
LABELS = {**{name: template["metadata"]["labels"] for name, template in TEMPLATES.items()}, "rabbitmq": RABBITMQ_LABELS}
EACH_POD = pytest.mark.parametrize("pod", sorted(PODS))
EACH_POLICY = pytest.mark.parametrize(
    "policy", [one for one in OBJECTS if one["kind"] == "NetworkPolicy"], ids=lambda one: one["metadata"]["name"]
)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", ())
    return wanted.items() <= labels.items() and all(labels.get(one["key"]) in one["values"] for one in expressions)


def _containers(pod: str) -> list[dict[str, Any]]:
    return PODS[pod]["containers"] + PODS[pod].get("initContainers", [])


def test_every_file_is_in_the_kustomization():
    named = {resource for resource in document(FOLDER / "kustomization.yaml")["resources"] if resource.endswith(".yaml")}
    assert named == {file.name for file in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}


def test_each_object_is_called_by_a_name_of_its_own():
    assert len(BY_NAME) == len(OBJECTS)
    for one in OBJECTS:
        assert re.fullmatch(r"[a-z0-9-]{1,63}", one["metadata"]["name"])
        assert "namespace" not in one["metadata"], "kustomization.yaml says it"


@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_as_kubernetes_has_them(version):
    for one in OBJECTS:
        if one["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_what_the_cluster_operator_gets_fits_into_a_stateful_set(version):
    template = {"metadata": {"labels": RABBITMQ_LABELS}, "spec": _with_images(RABBITMQ_POD)}
    spec = {"serviceName": "rabbitmq-nodes", "selector": {"matchLabels": RABBITMQ_LABELS}, "template": template}
    whole = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "rabbitmq-server"}, "spec": spec}
    kubernetes_validate.validate(whole, version, strict=True)
    pod = {
        "affinity": RABBITMQ["spec"]["affinity"],
        "containers": [{"name": "x", "image": "x", "resources": RABBITMQ["spec"]["resources"]}],
    }
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(whole, version, strict=True)


def _with_images(pod: dict[str, Any]) -> dict[str, Any]:
    lists = {key: [{"image": "rabbitmq", **one} for one in pod[key]] for key in ("containers", "initContainers")}
    return {**pod, **lists}


@EACH_POD
def test_a_pod_is_as_restricted_as_pod_security_asks(pod):
    context = PODS[pod]["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & PODS[pod].keys()
    for container in _containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }


@pytest.mark.parametrize("pod", sorted(TEMPLATES))
def test_a_pod_of_ours_has_limits_probes_and_no_token(pod):
    assert PODS[pod]["automountServiceAccountToken"] is False
    for container in PODS[pod]["containers"]:
        assert container["resources"].keys() == {"requests", "limits"}
        assert {"startupProbe", "livenessProbe"} <= container.keys()


@EACH_POD
def test_what_is_mounted_is_a_volume_and_what_is_a_volume_is_mounted(pod):
    claims = [
        claim["metadata"]["name"]
        for claim in BY_NAME.get(("StatefulSet", pod), {"spec": {}})["spec"].get("volumeClaimTemplates", ())
    ]
    volumes = {volume["name"] for volume in PODS[pod]["volumes"]} | set(claims)
    mounted = {mount["name"] for container in _containers(pod) for mount in container.get("volumeMounts", ())}
    assert mounted == volumes


@EACH_POD
def test_config_maps_and_claims_are_there_and_secrets_are_told_of(pod):
    for volume in PODS[pod]["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in BY_NAME
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in BY_NAME
        if "secret" in volume:
            assert volume["secret"]["secretName"] in _secrets()


def _secrets() -> dict[str, set[str]]:
    """By the README's commands: the keys of each."""
    found = {}
    for name, arguments in re.findall(r"kubectl (?:-n broker-fl )?create secret generic (\S+)((?:\s*\\?\n?\s*--\S+)+)", README):
        files = re.findall(r"--from-file=(\S+)", arguments)
        found[name] = {Path(file.partition("=")[0]).name for file in files}
    return found


def test_secrets_have_the_keys_that_are_asked_for_and_come_from_what_the_script_makes(secrets_folder):
    secrets = _secrets()
    for pod, spec in PODS.items():
        places = {mount["name"]: mount for container in _containers(pod) for mount in container.get("volumeMounts", ())}
        for volume in spec["volumes"]:
            if "secret" not in volume:
                continue
            keys, mount = secrets[volume["secret"]["secretName"]], places[volume["name"]]
            if "subPath" in mount:
                assert mount["subPath"] in keys
            for variable in [variable for container in spec["containers"] for variable in container.get("env", ())]:
                path = Path(variable["value"])
                if str(path.parent) == mount["mountPath"]:
                    assert path.name in keys, variable
    assert secrets["rabbitmq-tls"] == {"tls.crt", "tls.key", "ca.crt"}
    for file in re.findall(r"--from-file=\S*?(secrets/\S+)", README):
        assert (secrets_folder.parent / file).exists(), file


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget"])
def test_selectors_find_pods(kind):
    for one in OBJECTS:
        if one["kind"] == kind:
            selector = one["spec"]["selector"] if kind == "PodDisruptionBudget" else {"matchLabels": one["spec"]["selector"]}
            found = [pod for pod, labels in LABELS.items() if _selects(selector, labels)]
            assert len(found) == 1, one["metadata"]["name"]


def test_a_workload_selects_its_own_pods():
    for name, template in TEMPLATES.items():
        (workload,) = [one for one in OBJECTS if one["metadata"]["name"] == name and one["kind"] in ("Deployment", "StatefulSet")]
        assert workload["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]


def test_aggregators_and_nodes_are_on_machines_of_their_own():
    for affinity, labels in (
        (PODS["aggregator"]["affinity"], LABELS["aggregator"]),
        (RABBITMQ["spec"]["affinity"], RABBITMQ_LABELS),
    ):
        (term,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"] == labels
    assert BY_NAME["Deployment", "aggregator"]["spec"]["replicas"] == 2
    assert RABBITMQ["spec"]["replicas"] == 3


def test_only_the_brokers_tls_port_is_open_to_the_world():
    doors = [one for one in OBJECTS if one["kind"] == "Service" and one["spec"].get("type") in ("LoadBalancer", "NodePort")]
    assert [(one["metadata"]["name"], [port["port"] for port in one["spec"]["ports"]]) for one in doors] == [
        ("rabbitmq-outside", [5671])
    ]
    assert RABBITMQ["spec"]["service"] == {"type": "ClusterIP"}
    assert RABBITMQ["spec"]["tls"]["disableNonTLSListeners"] is True


def test_nobody_talks_to_anybody_by_default():
    spec = BY_NAME["NetworkPolicy", "default-deny"]["spec"]
    assert spec == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@EACH_POD
def test_a_pod_has_network_policies_of_its_own(pod):
    found = [one for one in OBJECTS if one["kind"] == "NetworkPolicy" and one["spec"]["podSelector"]]
    assert len([one for one in found if _selects(one["spec"]["podSelector"], LABELS[pod])]) == 1


def _peers(rules: list[dict[str, Any]], key: str) -> set[tuple[str, int]]:
    """Which pods of ours, at which ports."""
    found = set()
    for rule in rules:
        selectors = [peer["podSelector"] for peer in rule.get(key, ()) if "podSelector" in peer]
        for pod, labels in LABELS.items():
            if any(_selects(selector, labels) for selector in selectors) or key not in rule:
                found |= {(pod, port["port"]) for port in rule["ports"]}
    return found


def test_every_flow_is_let_out_and_let_in():
    flows = {
        ("aggregator", "rabbitmq", 5671),
        ("aggregator", "rabbitmq", 15671),
        ("aggregator", "postgresql", 5432),
        ("evaluator", "rabbitmq", 5671),
        ("rabbitmq", "rabbitmq", 4369),
        ("rabbitmq", "rabbitmq", 25672),
        ("rabbitmq", "rabbitmq", 6000),
    }
    specs = {pod: BY_NAME["NetworkPolicy", pod]["spec"] for pod in PODS}
    for source, target, port in flows:
        assert (target, port) in _peers(specs[source]["egress"], "to"), (source, target, port)
        assert (source, port) in _peers(specs[target]["ingress"], "from"), (source, target, port)
    ours = {(pod, *flow) for pod in ("aggregator", "evaluator") for flow in _peers(specs[pod]["egress"], "to")}
    assert ours == {flow for flow in flows if flow[0] != "rabbitmq"}
    assert "egress" not in specs["postgresql"]


@EACH_POLICY
def test_a_policy_names_ports(policy):
    for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
        assert rule["ports"]


def test_the_nodes_configuration_is_rabbitmq_conf_but_for_what_the_operator_says():
    folder = DEPLOY / "rabbitmq"
    wanted = settings_of_conf((folder / "rabbitmq.conf").read_text() + (folder / "rabbitmq-4.conf").read_text())
    by_operator = ("listeners.", "management.ssl.", "prometheus.")
    text = RABBITMQ["spec"]["rabbitmq"]["additionalConfig"]
    assert settings_of_conf(text) == {key: value for key, value in wanted.items() if not key.startswith(by_operator)}
    assert len(text) <= MOST_CONFIG_CHARACTERS


def test_the_nodes_tls_is_advanced_config_with_the_operators_paths():
    text = (DEPLOY / "rabbitmq" / "advanced.config").read_text()
    for ours, theirs in {"ca.pem": "ca.crt", "server.pem": "tls.crt", "server.key": "tls.key"}.items():
        text = text.replace(f"/etc/rabbitmq/tls/{ours}", f"/etc/rabbitmq-tls/{theirs}")
    wanted = [line for line in text.splitlines() if not line.lstrip().startswith("%%")]
    assert RABBITMQ["spec"]["rabbitmq"]["advancedConfig"].splitlines() == wanted
    (mount,) = [one["mountPath"] for one in RABBITMQ_POD["containers"][0]["volumeMounts"] if one["name"] == "revocations"]
    assert f'"{mount}"' in text


def test_the_nodes_have_the_plugins():
    by_operator = {"rabbitmq_management", "rabbitmq_prometheus"}
    wanted = set(re.findall(r"rabbitmq_\w+", (DEPLOY / "rabbitmq" / "enabled_plugins").read_text()))
    assert set(RABBITMQ["spec"]["rabbitmq"]["additionalPlugins"]) == wanted - by_operator


def test_the_nodes_import_the_definitions_where_the_configuration_looks_for_them():
    mounts = {one["name"]: one["mountPath"] for one in RABBITMQ_POD["containers"][0]["volumeMounts"]}
    folder = settings_of_conf(RABBITMQ["spec"]["rabbitmq"]["additionalConfig"])["definitions.local.path"]
    assert [mounts["definitions"], mounts["logins"]] == [f"{folder}/10-federation.json", f"{folder}/20-logins.json"]
    (data,) = BY_NAME["ConfigMap", "rabbitmq-definitions"]["data"].values()
    assert json.loads(data)["vhosts"] == [{"name": "federation"}]


@pytest.mark.parametrize("name", ["aggregator", "evaluator"])
def test_our_commands_and_settings_are_understood(secrets_folder, name):
    (container,) = PODS[name]["containers"]
    parse_command(*container["args"])
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    files = {"tls.crt": f"{name}.pem", "tls.key": f"{name}.key", "ca.crt": "ca.pem"}
    for variable, value in environment.items():
        if value.startswith("/run/secrets/"):
            file = Path(value).name
            environment[variable] = str(secrets_folder / files.get(file, file))
    settings = load_settings(DEPLOY / "federation" / "federation.toml", environment=environment)
    assert settings.broker.user() == name
    assert settings.broker.address() == "rabbitmq.broker-fl.svc:5671"
    (mount,) = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "federation"]
    assert container["args"][container["args"].index("--config") + 1] == f"{mount}/federation.toml"


def test_figures_are_read_where_they_are_served():
    monitor = BY_NAME["PodMonitor", "broker-fl"]["spec"]
    watched = [pod for pod, labels in LABELS.items() if _selects(monitor["selector"], labels)]
    assert sorted(watched) == ["aggregator", "evaluator"]
    ports = {pod: PODS[pod]["containers"][0]["ports"][0] for pod in watched}
    assert {port["name"] for port in ports.values()} == {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    for pod, port in ports.items():
        (probe, *_) = BY_NAME["NetworkPolicy", pod]["spec"]["ingress"][0]["ports"]
        assert probe["port"] == port["containerPort"]
    by_compose = {job["job_name"]: job for job in document(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]}
    _, detailed = BY_NAME["ServiceMonitor", "rabbitmq"]["spec"]["endpoints"]
    assert detailed["params"] == by_compose["rabbitmq-queues"]["params"]
    assert detailed["path"] == by_compose["rabbitmq-queues"]["metrics_path"]


def test_alerts_are_those_of_prometheus():
    assert BY_NAME["PrometheusRule", "broker-fl"]["spec"] == document(DEPLOY / "prometheus" / "rules.yml")


def test_objects_say_no_secret():
    text = yaml.safe_dump([one for one in OBJECTS if one["kind"] != "ConfigMap"])
    assert "Secret\n" not in re.findall(r"^- ?kind: (.*)$", text, re.MULTILINE)
    assert not [one for one in OBJECTS if one["kind"] == "Secret"]
    assert not re.search(r"://[^/\s]*:[^/\s]*@", text)
