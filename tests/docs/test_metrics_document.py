"""docs/metrics.md against what is counted, and against what the template says."""

import re
from pathlib import Path

import pytest
from metric_names import METRIC_NAMES, REGISTRIES

from broker_fl.cli.init import TEMPLATE
from broker_fl.cli.metrics.aggregator import ONLINE_S
from broker_fl.cli.metrics.labels import MOST_PARTIES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def _rows(title):
    """Type and labels by name."""
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 5 for row in rows)
    return {name.strip("`"): (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels, _, _ in rows}


@pytest.mark.parametrize("service", REGISTRIES)
def test_every_metric_is_documented_with_its_type_and_labels(service):
    counted = {}
    for collector in REGISTRIES[service]._collector_to_names:
        (family,) = collector.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        counted[name] = (family.type, list(collector._labelnames))
    assert _rows(service.capitalize()) == counted


def test_queries_name_series_that_there_are():
    queries = "\n".join(re.findall(r"```promql\n(.*?)```", DOCUMENT, re.DOTALL))
    named = set(re.findall(r"broker_fl_\w+", queries))
    assert len(named) >= 4
    assert named <= METRIC_NAMES


def test_the_numbers_in_the_text_are_those_of_the_code():
    text = " ".join(DOCUMENT.split())
    assert f"within the last {ONLINE_S / 60:.0f} minutes" in text
    assert f"beyond the first {MOST_PARTIES:,}" in text
    for port in re.findall(r"^(?:evaluator_)?port = \d+", DOCUMENT, re.MULTILINE):
        assert f"# {port}" in TEMPLATE
