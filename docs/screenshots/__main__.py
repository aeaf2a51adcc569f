"""The pictures in docs/console, of RabbitMQ's management console: python -m docs.screenshots [FOLDER]

It needs RabbitMQ and Chromium, takes some minutes, and leaves nothing running.
"""

import asyncio
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from broker_fl.cli.logs import LogFormat, LogLevel, configure_logs
from broker_fl.transports.local_rabbitmq import LocalRabbitMQ
from docs.screenshots.browser import Page, browser
from docs.screenshots.federation import HOSTILE, LOOK, NAMES, hospitals

WIDTH, HEIGHT = 1200, 2400
_MARGIN = 12
_COLORS = 256
_REFRESH_S = 6
"""The console asks for news every 5 s."""

_TOOLS = """
const sections = () => [...document.querySelectorAll('#main .section, #main .section-hidden, #main .section-invisible')];
const title = section => section.querySelector('h2').innerText.trim();
const body = section => section.querySelector('.hider');
const named = text => sections().find(section => title(section).startsWith(text));
const unfold = text => { if (body(named(text)).offsetParent === null) named(text).querySelector('h2').click(); };
const hide = found => { for (const one of found) one.style.display = 'none'; };
const only = (...texts) => hide(sections().filter(section => !texts.some(text => title(section).startsWith(text))));
const corners = () => {
  const boxes = all('*').map(one => one.getBoundingClientRect()).filter(box => box.width && box.height);
  const most = ['right', 'bottom'].map(side => Math.max(...boxes.map(box => box[side])));
  return JSON.stringify([document.querySelector('#main h1').getBoundingClientRect().top, ...most]);
};
const all = selector => [...document.querySelectorAll('#main ' + selector)];
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """`first` and `then` are scripts with `_TOOLS` at hand: what is clicked at first, and what is hidden at last."""

    name: str
    place: str
    first: str = ""
    then: str = ""


def _queue(name: str) -> str:
    return f"#/queues/{NAMES.federation}/{name}"


def _get(count: int) -> str:
    return f"""
    unfold('Get messages');
    const form = document.querySelector('form[action="#/queues/get"]');
    form.querySelector('[name=count]').value = {count};
    form.querySelector('[name=truncate]').value = 60;
    form.querySelector('[type=submit]').click();
    """


_ONLY_MESSAGES = """
only('Get messages'); hide(all('form')); hide(all('p'));
document.querySelector('#msg-wrapper').style.display = 'flex';
for (const message of all('#msg-wrapper .box')) { message.style.overflow = 'hidden'; message.style.flex = '1'; }
"""
_NO_FILTERS = "hide(all('.filter')); hide(all('.pagination')); hide(all('h3'));"

PICTURES = (
    Picture("connections", "#/connections", then=_NO_FILTERS),
    Picture("queues", "#/queues", then=_NO_FILTERS + "hide([named('Add a new queue')]);"),
    Picture("updates", _queue(NAMES.updates), "unfold('Consumers'); unfold('Bindings');", "only('Overview', 'Consumers');"),
    Picture("leader", _queue(NAMES.leader), "unfold('Consumers');", "only('Consumers');"),
    Picture("update", _queue(LOOK), _get(1), _ONLY_MESSAGES),
    Picture("receipts", _queue(NAMES.inbox(HOSTILE)), _get(3), _ONLY_MESSAGES + "hide(all('#msg-wrapper .box').slice(0, 1));"),
    Picture("quarantine", _queue(NAMES.quarantine), _get(3), _ONLY_MESSAGES + "hide(all('#msg-wrapper .box').slice(0, 1));"),
    Picture("policies", "#/policies", then=_NO_FILTERS + "hide([named('Add / update a policy'), named('Add / update an op')]);"),
    Picture("limits", "#/limits", then="only('User Limits');"),
    Picture("user", f"#/users/{HOSTILE}", then="only('Overview', 'Permissions'); hide(all('form')); hide(all('h3'));"),
    # At last: RabbitMQ shows the readers of a stream for some minutes after they went.
    Picture("model-log", _queue(NAMES.model_log), "unfold('Consumers');", "only('Overview', 'Consumers');"),
)
ALARM = (
    Picture("alarm", "#/", then="only('Nodes');"),
    Picture("blocked", "#/connections", then=_NO_FILTERS),
)


async def _log_in(page: Page, node: LocalRabbitMQ) -> None:
    await page.go(f"http://127.0.0.1:{node.management_port}")
    await page.until("!!document.querySelector('input[name=username]')")
    login = {"username": node.user, "password": node.password.get_secret_value()}
    for field, text in login.items():
        await page.run(f"document.querySelector('input[name={field}]').value = {json.dumps(text)}")
    await page.run("document.querySelector('input[type=submit]').click()")
    await page.until("!!document.querySelector('#main h1')")


async def _take(page: Page, picture: Picture, folder: Path) -> None:
    await page.run(f"location.hash = {json.dumps(picture.place)}")
    await asyncio.sleep(_REFRESH_S)
    if picture.first:
        await page.run(f"{{ {_TOOLS} {picture.first} }}")
        await asyncio.sleep(2)
    await page.run(f"{{ {_TOOLS} {picture.then} hide([...document.querySelectorAll('#header, #rhs, #footer')]); }}")
    top, right, bottom = json.loads(str(await page.run(f"{{ {_TOOLS} corners(); }}")))
    above, height = max(0, top - _MARGIN), bottom - top + 2 * _MARGIN
    png = await page.picture(above=above, width=min(WIDTH, right + _MARGIN), height=height)
    await asyncio.to_thread(_keep, png, folder / f"{picture.name}.png")


def _keep(png: bytes, file: Path) -> None:
    """In few colours: a third of the bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(_COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, optimize=True)


async def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as state:
        async with hospitals(Path(state)) as node, browser(width=WIDTH, height=HEIGHT) as page:
            await _log_in(page, node)
            for picture in PICTURES:
                await _take(page, picture, folder)
            await node.control("set_disk_free_limit", "900GB")
            await asyncio.sleep(2 * _REFRESH_S)
            for picture in ALARM:
                await _take(page, picture, folder)


if __name__ == "__main__":
    configure_logs(LogLevel.WARNING, LogFormat.CONSOLE)
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/console")))
