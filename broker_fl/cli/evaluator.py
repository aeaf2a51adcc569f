"""`broker-fl evaluator`, and starting it beside an aggregator."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from broker_fl.cli import options
from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs

if TYPE_CHECKING:
    from broker_fl.config import Settings

_LAST_EVALUATION_S = 120.0
_STOP_S = 10.0


def command(
    config: options.Config = None,
    broker: options.Broker = None,
    task: options.TaskName = None,
    model: options.Model = None,
    data: options.Data = None,
    device: options.Device = None,
    metrics_port: options.MetricsPort = None,
    until_stdin_closes: options.UntilStdinCloses = False,
    sets: options.Sets = None,
    log_level: options.Level = LogLevel.INFO,
    log_format: options.Format = LogFormat.CONSOLE,
) -> None:
    """Evaluates each new version on held-out data and tells the others. An aggregator starts one; more may run anywhere."""
    configure_logs(log_level, log_format)
    flags = options.flags_of(
        {
            "broker.url": broker,
            "task.name": task,
            "task.model": model,
            "task.data": data,
            "evaluation.device": device,
            "metrics.evaluator_port": metrics_port,
        },
        sets,
    )
    settings = options.load(config, flags)
    from broker_fl.cli.running import run

    run(_serve(settings, until_stdin_closes=until_stdin_closes))


async def _serve(settings: "Settings", *, until_stdin_closes: bool) -> None:
    from broker_fl.cli.metrics.endpoint import served
    from broker_fl.cli.metrics.evaluator import EvaluatorMetrics
    from broker_fl.cli.running import serve
    from broker_fl.cli.wiring import built_evaluator, use_threads
    from broker_fl.transports.amqp import amqp_connect

    use_threads(settings)
    # Not `port`: an aggregator has that, and starts an evaluator with the same settings.
    async with served(EvaluatorMetrics, host=settings.metrics.host, port=settings.metrics.evaluator_port) as observer:
        service = built_evaluator(settings, amqp_connect(settings.broker), observer=observer)
        await serve(service.run(), service.stop, until_stdin_closes=until_stdin_closes)


class EvaluatorProcess:
    """An evaluator as a child process, from when it is wanted; none where evaluation is turned off."""

    def __init__(self, start: Callable[[], Awaitable[asyncio.subprocess.Process]] | None) -> None:
        self._start = start
        self._wanted = asyncio.Event()
        self._child: asyncio.subprocess.Process | None = None

    def begin(self) -> None:
        """Once, however often it is called: an aggregator that stands by needs none."""
        self._wanted.set()

    async def last_evaluation(self) -> None:
        """Waits until the last model of a federation that is over is evaluated."""
        if self._child is not None:
            async with asyncio.timeout(_LAST_EVALUATION_S):
                await self._child.wait()

    async def serve(self, *, is_needed: bool) -> None:
        """Raises ConfigurationError if it ends badly and the federation can't do without."""
        import structlog

        from broker_fl.errors import ConfigurationError

        await self._wanted.wait()
        if self._start is None:
            return
        self._child = await self._start()
        code = await self._child.wait()
        if code and is_needed:
            raise ConfigurationError("a target accuracy needs the evaluator, and it ended: its error stands above")
        if code:
            structlog.get_logger(__name__).warning("the evaluator ended: versions are no longer evaluated", exit_code=code)

    async def end(self) -> None:
        if self._child is None or self._child.returncode is not None:
            return
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._child.wait()
        except TimeoutError:
            self._child.kill()
            await self._child.wait()


@asynccontextmanager
async def evaluator_process(settings: "Settings", config: Path | None, flags: options.Flags) -> AsyncIterator[EvaluatorProcess]:
    """Runs beside what is inside, and ends with it."""
    from broker_fl.errors import ConfigurationError

    is_needed = settings.aggregator.target_accuracy is not None
    if is_needed and not settings.evaluation.enabled:
        raise ConfigurationError("a target accuracy needs evaluation: drop --no-evaluation or the target")
    process = EvaluatorProcess(partial(_start, config, flags) if settings.evaluation.enabled else None)
    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(process.serve(is_needed=is_needed))
            yield process
            serving.cancel()
    finally:
        await process.end()


async def _start(config: Path | None, flags: options.Flags) -> asyncio.subprocess.Process:
    # -P: a folder named workers or schemas in the user's current directory must not take the place of ours.
    arguments = [sys.executable, "-P", "-m", "broker_fl", "evaluator", "--until-stdin-closes"]
    if config is not None:
        arguments += ["--config", str(config)]
    environment = {**os.environ, **options.environment_of(flags)}
    return await asyncio.create_subprocess_exec(*arguments, stdin=asyncio.subprocess.PIPE, env=environment)
