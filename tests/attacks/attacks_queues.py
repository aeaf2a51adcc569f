"""To read, empty or lock what is others', and to make what is nobody's."""

from attack import Group
from battlefield import Battlefield
from pamqp.base import Frame
from pamqp.commands import Basic, Exchange, Queue
from party import Party
from raw_amqp import ClosedError

QUEUES = Group("Others' queues")
attack = QUEUES.attack

READ = "permission: read `^(fl\\.F\\.model\\.log\\|fl\\.F\\.keyframes\\.log\\|fl\\.F\\.inbox\\.P)$`"
CONFIGURE = "permission: configure `^$`"
WRITE = "permission: write `^fl\\.F\\.up\\.P$`"


async def _each(party: Party, *tried: tuple[Frame, type]) -> str:
    """What the broker says to each, on a connection of its own."""
    answers = set()
    for method, answer in tried:
        try:
            async with party.raw() as raw:
                found = await raw.ask(method, answer)
                answers.add(type(found).__name__)
        except ClosedError as exc:
            answers.add(str(exc))
    return ", ".join(sorted(answers))


def _reading(what: str, queue: str) -> None:
    @attack(f"consumes, gets, purges, deletes and locks {what}", expected="403 ACCESS_REFUSED", rule=f"{READ}, {CONFIGURE}")
    async def read(field: Battlefield) -> str:
        name = f"fl.{field.names.federation}.{queue}"
        return await _each(
            await field.mallory(0),
            (Basic.Consume(queue=name), Basic.ConsumeOk),
            (Basic.Get(queue=name), Basic.GetOk),
            (Queue.Purge(queue=name), Queue.PurgeOk),
            (Queue.Delete(queue=name), Queue.DeleteOk),
            (Basic.Consume(queue=name, exclusive=True), Basic.ConsumeOk),
        )


for _what, _queue in (
    ("alice's inbox", "inbox.alice"),
    ("the updates queue", "updates"),
    ("the quarantine", "quarantine"),
    ("the leaders' queue", "leader"),
):
    _reading(_what, _queue)


@attack("empties the model log, which it may read", expected="540 NOT_IMPLEMENTED", rule="it is a stream")
async def purge_the_log(field: Battlefield) -> str:
    return await _each(await field.mallory(0), (Queue.Purge(queue=field.names.model_log), Queue.PurgeOk))


@attack("deletes the model log", expected="403 ACCESS_REFUSED", rule=CONFIGURE)
async def delete_the_log(field: Battlefield) -> str:
    return await _each(await field.mallory(0), (Queue.Delete(queue=field.names.model_log), Queue.DeleteOk))


@attack("locks the logs (exclusive consumer)", expected="others read on", rule="they are streams")
async def lock_the_logs(field: Battlefield) -> str:
    mallory, names = await field.mallory(0), field.names
    newcomer = await field.enrol("newcomer")
    since_first = {"x-stream-offset": "first"}
    async with mallory.raw() as raw:
        await raw.ask(Basic.Qos(prefetch_count=10), Basic.QosOk)
        for tag, log in enumerate((names.model_log, names.keyframe_log)):
            consume = Basic.Consume(queue=log, consumer_tag=str(tag), exclusive=True, arguments=since_first)
            await raw.ask(consume, Basic.ConsumeOk)
        before = field.version
        await field.go_on()
        frame = await newcomer.newest_frame()
        async with newcomer.raw() as other:
            await other.ask(Basic.Qos(prefetch_count=10), Basic.QosOk)
            await other.ask(Basic.Consume(queue=names.keyframe_log, arguments=since_first), Basic.ConsumeOk)
            await other.next_message()
    return "others read on" if frame.version >= before else f"others read version {frame.version}, not {before}"


@attack("declares queues and exchanges, also ones that the broker names", expected="403 ACCESS_REFUSED", rule=CONFIGURE)
async def declare(field: Battlefield) -> str:
    own = f"fl.{field.names.federation}.mine"
    return await _each(
        await field.mallory(0),
        (Queue.Declare(queue=own, durable=True), Queue.DeclareOk),
        (Queue.Declare(queue=f"{own}.stream", durable=True, arguments={"x-queue-type": "stream"}), Queue.DeclareOk),
        (Queue.Declare(exclusive=True), Queue.DeclareOk),
        (Exchange.Declare(exchange=own), Exchange.DeclareOk),
        (Exchange.Declare(exchange=field.names.up("zoe"), exchange_type="fanout"), Exchange.DeclareOk),
    )


@attack("binds itself to alice's inbox, and alice to nothing", expected="403 ACCESS_REFUSED", rule=WRITE)
async def bind(field: Battlefield) -> str:
    mallory, names = await field.mallory(0), field.names
    alice, updates = names.inbox("alice"), names.updates
    return await _each(
        mallory,
        (Queue.Bind(queue=alice, exchange=mallory.exchange), Queue.BindOk),
        (Queue.Bind(queue=names.inbox(mallory.name), exchange=names.receipts, routing_key="alice"), Queue.BindOk),
        (Queue.Bind(queue=names.inbox(mallory.name), exchange=names.up("alice")), Queue.BindOk),
        (Queue.Unbind(queue=updates, exchange=names.up("alice")), Queue.UnbindOk),
        (Queue.Unbind(queue=alice, exchange=names.receipts, routing_key="alice"), Queue.UnbindOk),
    )


@attack("deletes alice's exchange and inbox, and its own", expected="403 ACCESS_REFUSED", rule=CONFIGURE)
async def delete(field: Battlefield) -> str:
    mallory, names = await field.mallory(0), field.names
    return await _each(
        mallory,
        (Exchange.Delete(exchange=names.up("alice")), Exchange.DeleteOk),
        (Queue.Delete(queue=names.inbox("alice")), Queue.DeleteOk),
        (Exchange.Delete(exchange=mallory.exchange), Exchange.DeleteOk),
        (Queue.Delete(queue=names.inbox(mallory.name)), Queue.DeleteOk),
    )


@attack(
    "asks how long alice's inbox and the updates queue are (passive declaration)",
    expected="DeclareOk",
    rule="not defended: 4.2.6 asks for a permission first",
)
async def passive_declaration(field: Battlefield) -> str:
    names = field.names
    return await _each(
        await field.mallory(0),
        (Queue.Declare(queue=names.inbox("alice"), passive=True), Queue.DeclareOk),
        (Queue.Declare(queue=names.updates, passive=True), Queue.DeclareOk),
    )
