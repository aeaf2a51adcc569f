"""Prometheus' rules and Grafana's dashboard ask for series that there are."""

import json
import re
import shutil
import subprocess
from collections import Counter

import pytest
from deployment import DEPLOY, document, metrics_in
from metric_names import METRIC_NAMES

COMPOSE = document(DEPLOY / "compose.yaml")["services"]
PROMETHEUS = document(DEPLOY / "prometheus" / "prometheus.yml")
RULES = [rule for group in document(DEPLOY / "prometheus" / "rules.yml")["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "broker-fl.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]

NOT_SHOWN = frozenset({"broker_fl_parties_left_out_total"})
"""Of ours, by nobody: for who wonders why a party is missing."""


def test_each_alert_says_how_bad_it_is_and_what_it_means():
    assert [name for name, count in Counter(rule["alert"] for rule in RULES).items() if count > 1] == []
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert len(rule["annotations"]["summary"]) > 20
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


@pytest.mark.parametrize("expression", [*(rule["expr"] for rule in RULES), *EXPRESSIONS])
def test_series_of_ours_are_ones_that_there_are(expression):
    ours = {name for name in metrics_in(expression) if name.startswith("broker_fl_")}
    assert ours <= METRIC_NAMES
    assert metrics_in(expression) or "up{" in expression


def test_all_that_we_count_is_on_the_dashboard():
    shown = set().union(*map(metrics_in, EXPRESSIONS))
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in METRIC_NAMES}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown if name.startswith("broker_fl_")} == plain - NOT_SHOWN


def test_rates_are_of_counters_and_levels_are_of_gauges():
    for expression in [*EXPRESSIONS, *(rule["expr"] for rule in RULES)]:
        rated = {name for call in re.findall(r"(?:rate|increase)\((.*?)\[", expression) for name in metrics_in(call)}
        assert all(name.endswith(("_total", "_bucket", "_sum", "_count")) for name in rated), expression
        levels = metrics_in(expression) - rated
        assert not any(name.endswith(("_total", "_bucket")) and "suspensions" not in name for name in levels), expression


def test_panels_have_titles_and_places_of_their_own():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert panel["title"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_takes_the_data_source_that_is_chosen():
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_grafana_finds_dashboard_and_data_source():
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = document(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = document(provisioning / "dashboards" / "broker-fl.yml")["providers"]
    mounts = dict(volume.split(":")[1::-1] for volume in COMPOSE["grafana"]["volumes"])
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./grafana/provisioning"


def test_prometheus_reads_services_that_there_are_where_they_serve():
    targets = {
        job["job_name"]: {target for config in job["static_configs"] for target in config["targets"]}
        for job in PROMETHEUS["scrape_configs"]
    }
    assert targets == {
        "broker-fl": {"aggregator:9464", "standby:9464", "evaluator:9465"},
        "rabbitmq": {"rabbitmq:15691"},
        "rabbitmq-queues": {"rabbitmq:15691"},
        "prometheus": {"localhost:9090"},
    }
    hosts = {target.partition(":")[0] for target in set().union(*targets.values())} - {"localhost"}
    for host in hosts:
        assert "watch" in COMPOSE[host]["networks"]
    ports = dict(re.findall(r"BROKER_FL_METRICS__(\w*PORT)=(\d+)", (DEPLOY / "Dockerfile").read_text()))
    assert ports == {"PORT": "9464", "EVALUATOR_PORT": "9465"}


def test_prometheus_finds_its_files():
    mounts = dict(volume.split(":")[1::-1] for volume in COMPOSE["prometheus"]["volumes"])
    for file in PROMETHEUS["rule_files"]:
        assert (DEPLOY / mounts[file]).is_file()
    assert "ca.pem" in COMPOSE["prometheus"]["secrets"]
    for job in PROMETHEUS["scrape_configs"]:
        assert job.get("tls_config", {"ca_file": "/run/secrets/ca.pem"}) == {"ca_file": "/run/secrets/ca.pem"}


def test_alerts_come_when_they_should(tmp_path):
    """By Prometheus' own tool, where it is installed (Debian: apt install prometheus)."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for name in ("alerts_by_promtool.yml",):
        shutil.copy(DEPLOY.parent / "tests" / "deploy" / name, tmp_path)
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", tmp_path)
    ended = subprocess.run([promtool, "test", "rules", "alerts_by_promtool.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
