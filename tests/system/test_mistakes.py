"""What a person gets wrong is one line on standard error and exit code 2, without a traceback, and nothing is harmed."""

import socket

import numpy as np
import pytest
from command_line import Running
from pydantic import SecretStr
from small_federation import SmallFederation

from broker_fl.topology import party_permissions

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--set", "aggregator.verssions=3"), "unknown key 'verssions' in [aggregator]: did you mean 'versions'?"),
        (("--set", "aggregater.versions=3"), "unknown section [aggregater]: did you mean 'aggregator'?"),
        (("--set", "merging.strategy=fedasinc"), "merging.strategy: Input should be 'fedasync', 'fedbuff' or 'fedavg'"),
        (("--set", "partition.sizes=[1,"), "partition.sizes: Input should be a valid tuple"),
        (("--set", "training.learning_rate=fast"), "training.learning_rate: Input should be a valid number"),
        (("--versions", "0"), "aggregator.versions: Input should be greater than or equal to 1"),
        (("--config", "elsewhere.toml"), "there is no elsewhere.toml: `broker-fl init` writes a federation.toml"),
        (("--broker", "http://a:hidden@127.0.0.1/"), "broker.url: expected amqp://user:password@host:port/vhost"),
    ],
)
async def test_mistaken_setting_is_named_with_the_nearest_right_one(
    federation: SmallFederation, arguments: tuple[str, ...], expected: str
) -> None:
    aggregator = federation.run("aggregator", *arguments)
    line = await aggregator.ends_with_one_line()
    assert expected in line
    assert "hidden" not in line
    assert not federation.ledger_file.parent.exists()


async def test_mistaken_variable_of_the_environment_is_named(federation: SmallFederation) -> None:
    aggregator = federation.run("aggregator", variables={"BROKER_FL_AGREGATOR__VERSIONS": "3"})
    line = await aggregator.ends_with_one_line()
    assert line.startswith("unknown variable BROKER_FL_AGREGATOR__VERSIONS: did you mean 'BROKER_FL_AGGREGATOR__KEY'?")


async def test_file_that_is_not_toml_is_named(federation: SmallFederation) -> None:
    (federation.server / "federation.toml").write_text("[broker\n")
    line = await federation.run("aggregator").ends_with_one_line()
    assert line.startswith("federation.toml is not TOML: ")


async def test_what_the_aggregator_cannot_begin_with_is_named(federation: SmallFederation) -> None:
    closed = free_port()
    nowhere = f"amqp://a:hidden@127.0.0.1:{closed}/"
    user, host = federation.settings.broker.user(), federation.url.rpartition("@")[2]
    expected = {
        ("--task", "digitz"): "there is no task 'digitz': did you mean 'digits'?",
        ("--task", "digits", "--model", "smal_cnn"): "there is no model 'smal_cnn': did you mean 'small_cnn'?",
        ("--task", federation.task, "--set", "codec.up=topk:0.01+int3"): "int3",
        ("--task", federation.task, "--broker", nowhere): f"no broker answers at 127.0.0.1:{closed} (",
        ("--task", federation.task, "--broker", f"amqp://{user}:hidden@{host}"): f"refuses the login of {user!r}: wrong password",
    }
    started = {
        arguments: federation.run("aggregator", *arguments, "--state", f"state-{number}")
        for number, arguments in enumerate(expected)
    }
    said = {arguments: await running.ends_with_one_line() for arguments, running in started.items()}
    for arguments, line in said.items():
        assert expected[arguments] in line
        assert "hidden" not in line
    assert "`broker-fl demo --keep` starts one" in said["--task", federation.task, "--broker", nowhere]


async def test_data_that_cannot_be_read_is_named(federation: SmallFederation) -> None:
    whole, truncated, other, missing = (federation.folder / f"{name}.npz" for name in ("whole", "truncated", "other", "missing"))
    images = np.zeros((64, 8, 8), dtype=np.uint8)
    np.savez(whole, train_images=images, train_labels=np.arange(64) % 2, test_images=images, test_labels=np.arange(64) % 2)
    truncated.write_bytes(whole.read_bytes()[:3000])
    np.savez(other, pictures=images, train_labels=np.arange(64) % 2)
    expected = {
        missing: f"there is no file {missing}",
        truncated: f"{truncated} cannot be read as a .npz archive: ",
        other: f"{other} lacks train_images, test_images, test_labels; it has pictures, train_labels",
    }
    started = {
        data: federation.run(
            "worker", "--party", "a", "--broker", "amqp://a:b@127.0.0.1:1/", "--task", "npz", "--data", str(data)
        )
        for data in expected
    }
    for data, running in started.items():
        assert expected[data] in await running.ends_with_one_line()


async def test_enrolment_of_another_party_is_refused_before_anything_is_opened(federation: SmallFederation) -> None:
    await federation.enrol("a")
    line = await federation.worker("a", "--party", "b").ends_with_one_line()
    assert line == "a.toml is the enrolment of party 'a', not 'b'"
    assert not federation.outbox_file("a").parent.exists()


async def test_who_may_not_or_cannot_take_part_says_why_and_leaves_those_at_work_alone(
    federation: SmallFederation, vhost
) -> None:
    await federation.enrol("a", "b")
    aggregator, at_work = federation.aggregator(), federation.worker("a")
    await federation.reaches(5, aggregator, at_work)

    # A login with rights but without exchange and inbox, as left behind by somebody who tidied up.
    await vhost.management.put_user("c", SecretStr("hidden"))
    await vhost.management.put_permissions("c", party_permissions("blobs", "c"))
    federation.enrolled.add("c")
    host = federation.url.rpartition("@")[2]
    elsewhere = ("--set", "worker.state=elsewhere")
    impatient = ("--set", "broker.heartbeat_s=1")

    def stranger(name: str, *, password: str) -> Running:
        url = f"amqp://{name}:{password}@{host}"
        unsigned = ("--set", "security.signatures=false")
        task = ("--set", "federation.name=blobs", "--task", federation.task, *elsewhere, *unsigned)
        return federation.run("worker", "--party", name, "--broker", url, *task, name=f"worker-{name}", folder=federation.folder)

    second = federation.aggregator()
    started = {
        "another aggregator, with another ledger, is at work on federation 'blobs'": federation.aggregator(
            "--state", "elsewhere"
        ),
        "another worker on this machine already serves party 'a'": federation.worker("a"),
        "another worker already serves party 'a'": federation.worker("a", *elsewhere, *impatient),
        "the federation trains another model than this task": federation.worker("b", "--task", f"{federation.task[:-5]}:WIDE"),
        "refuses the login of 'nobody': wrong password, or not enrolled": stranger("nobody", password="hidden"),
        "fl.blobs.inbox.c": stranger("c", password="hidden"),
    }
    for expected, running in started.items():
        line = await running.ends_with_one_line()
        assert expected in line
        assert "hidden" not in line
    assert federation.outbox("b").last_sequence == 0
    # No mistake: with the same ledger it waits for its turn.
    await second.says("standing by: another aggregator leads")
    await federation.reaches(federation.version + 5, aggregator, at_work)
    assert second.is_alive
    aggregator.terminate()
    await aggregator.ends_well()
    await federation.reaches(federation.version + 5, second, at_work)


async def test_demo_on_a_port_in_use_says_so(federation: SmallFederation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        demo = federation.run("demo", "--amqp-port", str(port), "--versions", "2", "--parties", "1")
        assert f"AMQP port {port} cannot be used (Address already in use" in await demo.ends_with_one_line()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])
