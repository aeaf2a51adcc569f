"""`broker-fl worker`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs

if TYPE_CHECKING:
    from broker_fl.config import Settings


def command(
    party: Annotated[
        str | None, typer.Option("--party", help="The party's name, which is its login.", show_default=False)
    ] = None,
    enrolment: Annotated[
        Path | None, typer.Option("--enrolment", help="NAME.toml, as `broker-fl party add NAME` wrote it.", show_default=False)
    ] = None,
    config: options.Config = None,
    data: options.Data = None,
    broker: options.Broker = None,
    state: options.State = None,
    task: options.TaskName = None,
    model: options.Model = None,
    share: Annotated[
        str | None, typer.Option(help="I/N: this party's part of a data set that is dealt out.", show_default=False)
    ] = None,
    device: options.Device = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default=False)] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--no-channels-last", help="Memory layout of images.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch, for training.", show_default=False)] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Bytes of an update, as in 20kB: sparser than the federation asks.", show_default=False),
    ] = None,
    budget_seconds: Annotated[
        float | None,
        typer.Option(
            "--budget-seconds", help="How long sending an update may take, by what was measured of the line.", show_default=False
        ),
    ] = None,
    metrics_port: options.MetricsPort = None,
    until_stdin_closes: options.UntilStdinCloses = False,
    sets: options.Sets = None,
    log_level: options.Level = LogLevel.INFO,
    log_format: options.Format = LogFormat.CONSOLE,
) -> None:
    """Trains for one party. It may be killed and started at any moment, and ends when the federation is over."""
    configure_logs(log_level, log_format)
    flags = options.flags_of(
        {
            "broker.url": broker,
            "worker.party": party,
            "worker.state": state,
            "task.name": task,
            "task.model": model,
            "task.data": data,
            "worker.share": share,
            "worker.device": device,
            "worker.precision": precision,
            "worker.channels_last": channels_last,
            "worker.threads": threads,
            "worker.budget": budget,
            "worker.budget_seconds": budget_seconds,
            "metrics.port": metrics_port,
        },
        sets,
    )
    settings = options.load(config, flags, enrolment)
    _check_identity(settings, enrolment, party)
    from broker_fl.cli.running import run

    run(_serve(settings, until_stdin_closes=until_stdin_closes))


def _check_identity(settings: "Settings", enrolment: Path | None, party: str | None) -> None:
    """Before anything is loaded: the broker would refuse it too, but could not say why so well."""
    from broker_fl.config import load_settings
    from broker_fl.errors import ConfigurationError

    if enrolment is not None and party is not None:
        enrolled = load_settings(enrolment, environment={}).worker.party
        if enrolled != party:
            raise ConfigurationError(f"{enrolment} is the enrolment of party {enrolled!r}, not {party!r}")
    name, user = settings.worker.party, settings.broker.user()
    if name is not None and user != name:
        raise ConfigurationError(
            f"party {name!r} must log in as user {name!r}, and [broker] url says {user!r}: use --enrolment {name}.toml "
            f"(an operator makes it by `broker-fl party add {name}`)"
        )


async def _serve(settings: "Settings", *, until_stdin_closes: bool) -> None:
    from broker_fl.cli.metrics.endpoint import served
    from broker_fl.cli.metrics.worker import WorkerMetrics
    from broker_fl.cli.running import serve
    from broker_fl.cli.wiring import built_worker, use_threads
    from broker_fl.transports.amqp import amqp_connect

    use_threads(settings)
    async with served(WorkerMetrics, host=settings.metrics.host, port=settings.metrics.port) as observer:
        with built_worker(settings, amqp_connect(settings.broker), observer=observer) as service:
            await serve(service.run(), service.stop, until_stdin_closes=until_stdin_closes)
