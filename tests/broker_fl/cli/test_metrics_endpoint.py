"""`/metrics` over HTTP, in this process."""

import asyncio
import http.client
import math
import socket
import threading
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from metric_names import REGISTRIES, series_of
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from broker_fl.cli.metrics.aggregator import AggregatorMetrics
from broker_fl.cli.metrics.endpoint import served
from broker_fl.cli.metrics.evaluator import EvaluatorMetrics
from broker_fl.config import load_settings
from broker_fl.errors import ConfigurationError

LOOPBACK = "127.0.0.1"


def get(url, *, path=None, method="GET"):
    """Status and text."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        connection.request(method, path or parts.path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@asynccontextmanager
async def serving(make=AggregatorMetrics, *, port=0):
    """The metrics, and where they are, by the log."""
    with capture_logs() as logs:
        async with served(make, host=LOOPBACK, port=port) as metrics:
            (entry,) = logs
            assert entry["event"] == "metrics are served"
            yield metrics, entry["url"]


@pytest.mark.parametrize("key", ["port", "evaluator_port"])
@pytest.mark.parametrize("port", [-1, 65_536, "http"])
def test_a_port_that_cannot_be_is_a_mistake_in_the_settings(key, port):
    with pytest.raises(ConfigurationError, match=rf"metrics\.{key}"):
        load_settings(flags={"metrics": {key: port}}, environment={})


async def test_what_is_counted_is_read_over_http():
    async with serving() as (metrics, url):
        metrics.has_version(41)
        status, text = await asyncio.to_thread(get, url)
    assert status == 200
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert found["broker_fl_version"].samples[0].value == 41
    assert found["broker_fl_commit_seconds"].type == "histogram"
    assert "broker_fl_version 41.0" in text


async def test_every_series_and_no_birthdays_are_read():
    async with serving() as (_, url):
        _, text = await asyncio.to_thread(get, url)
    read = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    # Bytes and epsilons have no series before there are any.
    assert series_of(REGISTRIES["aggregator"]) - read == {"broker_fl_bytes_total", "broker_fl_party_epsilon"}
    assert read <= series_of(REGISTRIES["aggregator"])


async def test_without_a_port_nothing_is_made_or_served():
    with capture_logs() as logs:
        async with served(AggregatorMetrics, host=LOOPBACK, port=None) as metrics:
            assert metrics is None
    assert logs == []


async def test_the_port_is_free_again_afterwards_and_its_thread_is_gone():
    async with serving() as (_, url):
        port = urlsplit(url).port
        assert [thread.name for thread in threading.enumerate()].count("metrics") == 1
    with socket.socket() as caller:
        assert await asyncio.to_thread(caller.connect_ex, (LOOPBACK, port)) != 0
    async with serving(port=port) as (_, again):
        assert again == url
    assert "metrics" not in [thread.name for thread in threading.enumerate()]


async def test_two_services_in_one_process_have_ports_and_numbers_of_their_own():
    async with serving() as (aggregator, one), serving(EvaluatorMetrics) as (_, other):
        aggregator.has_version(5)
        texts = [(await asyncio.to_thread(get, url))[1] for url in (one, other)]
    assert "broker_fl_version 5.0" in texts[0]
    assert "broker_fl_version" not in texts[1]
    assert "broker_fl_evaluated_version NaN" in texts[1]


async def test_a_port_in_use_is_a_mistake_that_says_so():
    async with serving() as (_, url):
        port = urlsplit(url).port
        with pytest.raises(ConfigurationError, match=rf"port {port} of 127\.0\.0\.1 is in use: .*--metrics-port"):
            async with served(AggregatorMetrics, host=LOOPBACK, port=port):
                pass


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid", "x" * 70])
async def test_a_host_of_somewhere_else_is_a_mistake_that_says_so(host):
    with pytest.raises(ConfigurationError, match=f"nothing can listen at port 0 of {host}"):
        async with served(AggregatorMetrics, host=host, port=0):
            pass


async def test_other_paths_are_not_found_and_nothing_can_be_changed():
    async with serving() as (_, url):
        assert (await asyncio.to_thread(get, url, path="/"))[0] == 404
        assert (await asyncio.to_thread(get, url, path="/metrics/../etc/passwd"))[0] == 404
        assert (await asyncio.to_thread(get, url, method="POST"))[0] == 501
        status, text = await asyncio.to_thread(get, url, path="/metrics?name[]=broker_fl_leading")
    assert (status, "broker_fl_version" in text, "broker_fl_leading 0.0" in text) == (200, False, True)


async def test_readers_who_stall_or_hang_up_keep_nobody_from_reading_for_long():
    async with serving() as (metrics, url):
        address = (LOOPBACK, urlsplit(url).port)
        stalled = [await asyncio.to_thread(socket.create_connection, address) for _ in range(20)]
        try:
            for connection in stalled[:4]:
                connection.sendall(b"GET /metr")
            for connection in stalled:
                connection.close()
            metrics.has_version(2)
            async with asyncio.timeout(20):
                while True:
                    try:
                        status, text = await asyncio.to_thread(get, url)
                    except (OSError, http.client.HTTPException):
                        continue  # All places were taken.
                    break
        finally:
            for connection in stalled:
                connection.close()
    assert status == 200
    assert "broker_fl_version 2.0" in text


async def test_more_readers_than_there_are_places_are_turned_away():
    async with serving() as (_, url):
        address = (LOOPBACK, urlsplit(url).port)
        held = [await asyncio.to_thread(socket.create_connection, address) for _ in range(8)]
        try:
            ninth = await asyncio.to_thread(socket.create_connection, address)
            ninth.settimeout(5)
            assert await asyncio.to_thread(ninth.recv, 1) == b""
            ninth.close()
        finally:
            for connection in held:
                connection.close()


async def test_the_loop_runs_while_metrics_are_read():
    async with serving() as (metrics, url):
        for number in range(3000):
            metrics._epsilons.labels(f"p{number}").set(math.pi)
        reading = asyncio.create_task(asyncio.to_thread(get, url))
        turns = 0
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
    assert (await reading)[0] == 200
    assert turns > 1
