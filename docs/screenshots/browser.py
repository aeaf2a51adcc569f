"""Chromium without a window, driven over the DevTools protocol by two pipes: nothing to install but the browser."""

import asyncio
import base64
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_ANSWER_S = 60.0

_BY_PIPES = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for pipe, number in zip(pipes, (3, 4)):
    os.dup2(pipe, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from its descriptor 3, and answers on 4."""


class Page:
    """One page of `browser`."""

    def __init__(self, answers: asyncio.StreamReader, commands: asyncio.StreamWriter) -> None:
        self._answers = answers
        self._commands = commands
        self._number = 0
        self._session: str | None = None

    async def open(self, *, width: int, height: int) -> None:
        targets = (await self._call("Target.getTargets"))["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = (await self._call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        await self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    async def go(self, url: str) -> None:
        await self._call("Page.navigate", url=url)

    async def run(self, script: str) -> object:
        """What the script's last expression gives. Raises RuntimeError where it throws."""
        answer = await self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{answer['exceptionDetails']['exception'].get('description')}, in: {script}")
        return answer["result"].get("value")

    async def until(self, script: str) -> None:
        """Until the script gives something true. Raises TimeoutError."""
        async with asyncio.timeout(_ANSWER_S):
            while True:
                if await self.run(script):
                    return
                await asyncio.sleep(0.2)

    async def picture(self, *, above: float, width: float, height: float) -> bytes:
        """A PNG of the left of the page, below what is above."""
        clip = {"x": 0, "y": above, "width": width, "height": height, "scale": 1}
        return base64.b64decode((await self._call("Page.captureScreenshot", clip=clip))["data"])

    async def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        """One at a time; events in between are nobody's concern."""
        self._number += 1
        command: dict[str, object] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        self._commands.write(json.dumps(command).encode() + b"\0")
        async with asyncio.timeout(_ANSWER_S):
            while (answer := json.loads((await self._answers.readuntil(b"\0"))[:-1])).get("id") != self._number:
                pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result


@asynccontextmanager
async def browser(*, width: int, height: int) -> AsyncIterator[Page]:
    """Raises FileNotFoundError without a browser."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        raise FileNotFoundError(f"no browser was found: install one of {', '.join(_PROGRAMS)}")
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    loop = asyncio.get_running_loop()
    answers = asyncio.StreamReader(limit=64 << 20)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _BY_PIPES, str(commands_out), str(answers_in)),
            *(*arguments, "--remote-debugging-pipe"),
            pass_fds=(commands_out, answers_in),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        os.close(commands_out)
        os.close(answers_in)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(answers), os.fdopen(answers_out, "rb"))
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(commands_in, "wb"))
        try:
            page = Page(answers, asyncio.StreamWriter(transport, protocol, None, loop))
            await page.open(width=width, height=height)
            yield page
        finally:
            transport.close()
            if process.returncode is None:
                process.terminate()
            await process.wait()
