"""`broker-fl aggregator`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs

if TYPE_CHECKING:
    from broker_fl.config import Settings
    from schemas.manifest import Manifest


def command(
    config: options.Config = None,
    broker: options.Broker = None,
    state: options.State = None,
    task: options.TaskName = None,
    model: options.Model = None,
    data: options.Data = None,
    versions: Annotated[int | None, typer.Option(help="End the federation at this version.", show_default=False)] = None,
    seconds: Annotated[float | None, typer.Option(help="End it after so many seconds of work.", show_default=False)] = None,
    target_accuracy: Annotated[
        float | None, typer.Option(help="End it when the held-out data is classified this well.", show_default=False)
    ] = None,
    evaluation: Annotated[
        bool | None,
        typer.Option("--evaluation/--no-evaluation", help="Evaluate new versions in a process beside.", show_default=False),
    ] = None,
    ledger: options.Ledger = None,
    metrics_port: options.MetricsPort = None,
    until_stdin_closes: options.UntilStdinCloses = False,
    sets: options.Sets = None,
    log_level: options.Level = LogLevel.INFO,
    log_format: options.Format = LogFormat.CONSOLE,
) -> None:
    """Merges what the parties send, and broadcasts the model. It may be killed at any moment: started again, it goes on.

    A second one with the same ledger and snapshots stands by, and goes on where the first one ends.
    """
    configure_logs(log_level, log_format)
    flags = options.flags_of(
        {
            "broker.url": broker,
            "aggregator.state": state,
            "aggregator.ledger": ledger,
            "task.name": task,
            "task.model": model,
            "task.data": data,
            "aggregator.versions": versions,
            "aggregator.seconds": seconds,
            "aggregator.target_accuracy": target_accuracy,
            "evaluation.enabled": evaluation,
            "metrics.port": metrics_port,
        },
        sets,
    )
    settings = options.load(config, flags)
    from broker_fl.cli.running import run

    run(_serve(settings, config, flags, until_stdin_closes=until_stdin_closes))


async def _serve(settings: "Settings", config: Path | None, flags: options.Flags, *, until_stdin_closes: bool) -> None:
    from broker_fl.cli.evaluator import evaluator_process
    from broker_fl.cli.metrics.aggregator import AggregatorMetrics
    from broker_fl.cli.metrics.endpoint import served
    from broker_fl.cli.running import serve
    from broker_fl.cli.wiring import built_aggregator
    from broker_fl.enrolment import Register
    from broker_fl.transports.amqp import amqp_connect

    async with (
        served(AggregatorMetrics, host=settings.metrics.host, port=settings.metrics.port) as observer,
        evaluator_process(settings, config, flags) as evaluator,
    ):
        connect, register = amqp_connect(settings.broker), Register(settings)
        with built_aggregator(settings, connect, on_lead=evaluator.begin, register=register, observer=observer) as built:
            await _apply_policies(settings, built.manifest)
            service = built.service
            await serve(service.run(built.open_state), service.stop, until_stdin_closes=until_stdin_closes)
        if built.coordinator.is_over:
            await evaluator.last_evaluation()
    counts = built.coordinator.counts
    summary = ", ".join(f"{counts[name]} {name}" for name in ("merged", "buffered", "refused", "duplicate"))
    over = "the federation is over" if built.coordinator.is_over else "stopped; the same command goes on"
    typer.echo(f"version {built.coordinator.version}: {summary}; {over}")


async def _apply_policies(settings: "Settings", manifest: "Manifest") -> None:
    """Lengths and limits are policies, which AMQP can't set. Without them the two logs grow without bound."""
    import structlog

    from broker_fl.enrolment import inbox_limits, management_of
    from broker_fl.errors import BrokerError
    from broker_fl.topology import operator_policies, policies

    federation = settings.federation.name
    try:
        async with management_of(settings.broker) as management:
            await management.apply_policies(policies(federation, model_bytes=4 * manifest.size))
            await management.apply_operator_policies(operator_policies(federation, inbox_limits(settings)))
    except BrokerError as exc:
        structlog.get_logger(__name__).warning(
            "policies were not checked: the two logs of the model, quarantine and inboxes may be unbounded", reason=str(exc)
        )
