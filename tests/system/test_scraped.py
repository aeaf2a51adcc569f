"""Metrics as Prometheus gets them: over HTTP, from processes at work on a real broker."""

import asyncio
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable

import pytest
from command_line import PATIENCE_S, Running
from prometheus_client.parser import text_string_to_metric_families
from small_federation import SmallFederation

from broker_fl.privacy.accounting import Steps, composed, epsilon_of
from workers.spending import open_spending

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(600)]

DELTA = 1e-5
Values = dict[str, float]


async def scraped(url: str) -> Values:
    """By name and labels, as a query writes them."""
    text = await asyncio.to_thread(_read, url)
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {f"{sample.name}{dict(sorted(sample.labels.items())) or ''}": sample.value for sample in samples}


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - ours, by http
        text: str = answer.read().decode()
    return text


async def urls(running: Running, count: int = 1) -> list[str]:
    """Where it says that its metrics are, and that of a child's."""
    await running.says("metrics are served", times=count)
    return [re.findall(r"http://[\w.:]+/metrics", line)[0] for line in running.lines("metrics are served")]


async def agree(url: str, expected: Callable[[], Values], *, where: Callable[[Values], bool] = lambda _: True) -> Values:
    """Waits until the metrics are what the disk says, which is read again each time; gives all of them."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        said = expected()
        found = await scraped(url)
        shown = {name: found.get(name, 0.0) for name in said}
        if shown == pytest.approx(said, rel=1e-6) and where(found):
            return found
        assert time.monotonic() < deadline, f"{shown}\nis not {said}"
        await asyncio.sleep(0.1)


async def test_metrics_are_what_ledger_outbox_and_privacy_record_say(federation: SmallFederation) -> None:
    federation.configure(
        codec={"up": "int8"},
        privacy={"mechanism": "dp-sgd", "noise_multiplier": 2.0, "delta": DELTA},
        evaluation={"enabled": True},
        metrics={"evaluator_port": 0},
    )
    await federation.enrol("a")
    aggregator = federation.aggregator("--metrics-port", "0")
    worker = federation.worker("a", "--metrics-port", "0")
    await federation.reaches(5, aggregator, worker)
    by_content = {
        "leading" if "broker_fl_leading" in await scraped(url) else "accuracy": url for url in await urls(aggregator, 2)
    }

    # A party that is frozen sends nothing more: the aggregator comes to rest.
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        found = await agree(by_content["leading"], lambda: _of_the_ledger(federation))
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert found["broker_fl_leading"] == found["broker_fl_parties_online"] == 1
    assert 0 <= found["broker_fl_queue_age_seconds_sum"] < 60 * found["broker_fl_queue_age_seconds_count"]
    assert found["broker_fl_commit_seconds_count"] > 0
    assert found["broker_fl_broadcast_seconds_count"] > 0

    evaluated = await agree(by_content["accuracy"], dict, where=lambda values: values["broker_fl_evaluation_seconds_count"] > 0)
    assert 0 < evaluated["broker_fl_accuracy"] <= 1
    assert 0 <= evaluated["broker_fl_evaluated_version"] <= federation.version

    # Without an aggregator the worker comes to rest.
    aggregator.terminate()
    await aggregator.ends_well()
    (url,) = await urls(worker)
    found = await agree(url, lambda: _of_the_worker(federation, "a"))
    assert found["broker_fl_worker_connected"] == 1
    assert found["broker_fl_worker_version"] > 0


def _of_the_ledger(federation: SmallFederation) -> Values:
    entries = federation.updates()
    merged = [entry for entry in entries if entry.outcome == "merged"]
    spent = composed(Steps(entry.noise_multiplier or 0, entry.sample_rate or 0, entry.num_steps or 0) for entry in entries)
    return {
        "broker_fl_version": federation.version,
        "broker_fl_updates_total{'outcome': 'merged'}": len(merged),
        "broker_fl_staleness_versions_sum": sum(entry.staleness or 0 for entry in merged),
        "broker_fl_effective_weight_sum": sum(entry.weight or 0 for entry in merged),
        "broker_fl_bytes_total{'codec': 'int8', 'direction': 'up'}": sum(entry.size or 0 for entry in entries),
        "broker_fl_queue_age_seconds_count": len(entries),
        "broker_fl_party_epsilon{'party': 'a'}": epsilon_of(spent, delta=DELTA, accountant="rdp"),
    }


def _of_the_worker(federation: SmallFederation, party: str) -> Values:
    box = federation.outbox(party)
    with open_spending(federation.home(party) / "broker-fl-state" / f"privacy-{party}.db") as spending:
        epsilon = epsilon_of(spending.history(), delta=DELTA, accountant="rdp")
    return {
        "broker_fl_worker_trainings_total": box.counters["trainings"],
        "broker_fl_worker_updates_total{'outcome': 'merged'}": box.counters["updates_merged"],
        "broker_fl_worker_unsettled_updates": len(box.unsettled),
        "broker_fl_bytes_total{'codec': 'int8', 'direction': 'up'}": box.counters["bytes_up"],
        "broker_fl_worker_epsilon": epsilon,
    }


async def test_a_port_in_use_is_told_in_one_line(federation: SmallFederation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        federation.configure(metrics={"port": port})
        said = await federation.aggregator().ends_with_one_line()
    assert said.startswith(f"[metrics]: port {port} of 127.0.0.1 is in use")
