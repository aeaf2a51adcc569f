"""`broker-fl demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from broker_fl.cli import options
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs

if TYPE_CHECKING:
    from rich.console import Console

    from broker_fl.cli.demonstration.plan import Demo
    from broker_fl.cli.demonstration.summary import Summary


def command(
    task: options.TaskName = None,
    model: options.Model = None,
    data: options.Data = None,
    parties: Annotated[int, typer.Option(min=1, max=200, help="How many workers.")] = 5,
    broker: Annotated[str, typer.Option(help="auto, memory, or amqp://user:password@host:port/vhost.")] = "auto",
    versions: Annotated[int | None, typer.Option(min=1, help="Where it ends; 30 a party by default.", show_default=False)] = None,
    seconds: Annotated[float | None, typer.Option(help="Or when.", show_default=False)] = None,
    partition: Annotated[str, typer.Option(help="How the data is dealt out: iid, dirichlet or shards.")] = "iid",
    device: options.Device = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16, for training.", show_default=False)] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--no-channels-last", help="Memory layout of images.", show_default=False)
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            "--epsilon",
            help="Train with differential privacy: what each party may spend on its examples, at delta 1e-5.",
            show_default=False,
        ),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Over mutual TLS: everyone logs in by a certificate of an authority made for the demo.")
    ] = False,
    steady: Annotated[bool, typer.Option("--steady", help="Nobody is late, slow or killed.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the private broker up afterwards, to look at.")] = False,
    amqp_port: Annotated[
        int | None, typer.Option(help="Of the private broker; a free one by default.", show_default=False)
    ] = None,
    management_port: Annotated[int | None, typer.Option(help="Of its management console; likewise.", show_default=False)] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep ledger, outboxes and logs here; a new or empty folder.", show_default=False)
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary here.", show_default=False)] = None,
    sets: options.Sets = None,
) -> None:
    """Train one model among several parties on this machine: a broker, an aggregator and workers, each a process of its own.

    One party comes late, one is slow, one is killed and comes back; --steady turns that off.
    """
    configure_logs(LogLevel.WARNING, LogFormat.CONSOLE)
    import tempfile

    from rich.console import Console

    flags = options.flags_of(
        {
            "task.name": task,
            "task.model": model,
            "task.data": None if data is None else str(data.absolute()),
            "worker.device": device,
            "evaluation.device": device,
            "worker.precision": precision,
            "worker.channels_last": channels_last,
        },
        sets,
    )
    if tls and keep and folder is None:
        raise typer.BadParameter("goes with --tls only where --folder says where the certificates stay", param_hint="--keep")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="broker-fl-demo-", ignore_cleanup_errors=True) as temporary:
        from broker_fl.cli.demonstration.plan import Demo

        demo = Demo(
            parties=parties,
            versions=versions,
            seconds=seconds,
            steady=steady,
            keep=keep,
            scheme=partition,
            epsilon=epsilon,
            tls=tls,
            folder=_prepared(folder) if folder else Path(temporary),
            flags=flags,
        )
        summary = _play(demo, broker, amqp_port=amqp_port, management_port=management_port, console=console)
    _show(summary, console, json_file)


def _prepared(folder: Path) -> Path:
    from broker_fl.errors import ConfigurationError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"--folder {folder} must be new or an empty folder: a demo begins from the beginning")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def _show(summary: "Summary", console: "Console", json_file: Path | None) -> None:
    import json
    from dataclasses import asdict

    from broker_fl.cli.demonstration.view import show_summary
    from broker_fl.database import storage_errors

    show_summary(console, summary)
    if json_file is not None:
        with storage_errors(str(json_file)):
            json_file.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")


def _play(demo: "Demo", broker: str, *, amqp_port: int | None, management_port: int | None, console: "Console") -> "Summary":
    from broker_fl.cli.demonstration.play import new_figures, play
    from broker_fl.cli.demonstration.stage import set_stage
    from broker_fl.cli.demonstration.summary import summarise
    from broker_fl.cli.demonstration.view import News
    from broker_fl.cli.running import run, until_signalled
    from broker_fl.config import load_settings

    # What can be wrong with the settings is found before a broker is started.
    settings = load_settings(flags=demo.settings(federation="demo"), environment={})
    news = News(console, goal_versions=settings.aggregator.versions, max_epsilon=settings.privacy.most_epsilon)

    async def on_stage() -> "Summary":
        async with set_stage(demo, broker, amqp_port=amqp_port, management_port=management_port, say=news.say) as stage:
            figures = new_figures(stage)
            async with news.about(figures):
                await play(stage, settings, figures, say=news.say)
            return summarise(settings, figures, broker=stage.broker)

    return run(until_signalled(on_stage()))
