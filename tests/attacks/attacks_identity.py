"""To be taken for somebody else, with one's own valid login."""

import asyncio
from dataclasses import replace
from secrets import token_hex

import httpx
from attack import Group
from battlefield import Battlefield
from raw_amqp import ClosedError

from broker_fl.signing import SigningKey

IDENTITY = Group("Identity")
attack = IDENTITY.attack

USER_ID = "RabbitMQ: user_id must be the login"
OWN_EXCHANGE = "permission: write `^fl\\.F\\.up\\.P$`"
SIGNATURE = "`[security] signatures`"


@attack("says nothing of who it is (no user_id)", expected="refused: identity", rule="the aggregator asks for a user_id")
async def without_user_id(field: Battlefield) -> str:
    mallory = await field.mallory()
    letter = mallory.letter(await mallory.update(), user_id=None)
    await mallory.posts(letter)
    return f"refused: {await field.quarantined(letter.properties.message_id)}"


@attack("says that it is alice (user_id)", expected="406 PRECONDITION_FAILED", rule=USER_ID)
async def with_anothers_user_id(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter(await mallory.update(), user_id="alice"))


@attack("publishes to alice's exchange", expected="403 ACCESS_REFUSED", rule=OWN_EXCHANGE)
async def through_anothers_exchange(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(replace(mallory.letter(await mallory.update()), exchange=field.names.up("alice")))


@attack(
    "publishes straight into the updates queue (default exchange)",
    expected="403 ACCESS_REFUSED",
    rule="permission: `amq.default` is not to be written",
)
async def through_the_default_exchange(field: Battlefield) -> str:
    mallory = await field.mallory()
    letter = mallory.letter(await mallory.update())
    try:
        async with mallory.publisher() as raw:
            return await raw.publish("", letter.body, letter.properties, routing_key=field.names.updates)
    except ClosedError as exc:
        return str(exc)


@attack(
    "names alice in the update, through its own exchange",
    expected="refused: identity",
    rule="exchange, user_id and the update's party must be one",
)
async def names_another_party(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter(await mallory.update(party="alice")))


@attack(
    "takes the id of an update that another party is about to send",
    expected="both merged, once each",
    rule="the ledger's key is (party, update id)",
)
async def burns_anothers_id(field: Battlefield) -> str:
    mallory, carol = await field.mallory(0), await field.enrol("carol")
    async with carol.listening():
        hers = carol.letter(await carol.update())
        stolen = await mallory.sends(mallory.letter(await mallory.update(update_id=hers.properties.message_id)))
        own = await carol.sends(hers)
        again = await carol.sends(hers)
    count = len(field.entries("carol"))
    return (
        "both merged, once each"
        if (stolen, own, again, count) == ("merged",) * 3 + (1,)
        else f"{stolen}, {own}, {again}, {count}"
    )


async def _copied(field: Battlefield, header: str) -> str:
    """To whoever a topic exchange of an old RabbitMQ would send it."""
    mallory, names, since = await field.mallory(0), field.names, len(field.tapped)
    targets = [names.inbox("alice"), "alice", names.updates, names.model, names.model_log, names.receipts]
    update = await mallory.update()
    signed = mallory.letter(update)
    letter = replace(signed, properties=mallory.letter(update, headers={**signed.properties.headers, header: targets}).properties)
    outcome = await mallory.sends(letter)
    await asyncio.sleep(0.1)
    copies = [one for one in field.tapped[since:] if one.message_id == update.update_id and one.routing_key != mallory.name]
    times = len([entry for entry in field.entries(mallory.name) if entry[0] == update.update_id])
    return (
        f"{outcome} once, copied to nobody"
        if (len(copies), times) == (0, 1)
        else f"{outcome} {times} times, {len(copies)} copies"
    )


@attack(
    "copies to alice's inbox, updates and model (CC)",
    expected="merged once, copied to nobody",
    rule="a party's exchange is a fanout",
)
async def carbon_copies(field: Battlefield) -> str:
    return await _copied(field, "CC")


@attack("the same, hidden (BCC)", expected="merged once, copied to nobody", rule="a party's exchange is a fanout")
async def blind_carbon_copies(field: Battlefield) -> str:
    return await _copied(field, "BCC")


@attack("signs nothing", expected="refused: signature", rule=SIGNATURE)
async def unsigned(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter(await mallory.update(), headers={}))


@attack("signs with a key that it was not enrolled with", expected="refused: signature", rule=SIGNATURE)
async def signed_by_another_key(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter(await mallory.update(), key=SigningKey.generate()))


@attack("changes a fact after it was signed", expected="refused: signature", rule=SIGNATURE)
async def changed_after_signing(field: Battlefield) -> str:
    mallory = await field.mallory()
    update = await mallory.update()
    headers = mallory.letter(update).properties.headers
    changed = update.model_copy(update={"num_samples": 10**12})
    return await mallory.sends(mallory.letter(changed, headers=headers))


@attack("signs for another ledger", expected="refused: base", rule="what is signed names the ledger")
async def signed_for_another_ledger(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter(await mallory.update(ledger=token_hex(16))))


@attack("signs for another federation", expected="refused: federation", rule="the update's federation")
async def signed_for_another_federation(field: Battlefield) -> str:
    mallory = await field.mallory()
    return await mallory.sends(mallory.letter(await mallory.update(federation="elsewhere")))


@attack("logs in to the management API", expected="401", rule="its user has no tags")
async def management_api(field: Battlefield) -> str:
    mallory = await field.mallory(0)
    url = field.federation.settings.broker.management().get_secret_value()
    base = f"http://{url.rpartition('@')[2]}/api"
    async with httpx.AsyncClient(auth=(mallory.name, mallory.password), trust_env=False) as client:
        answers = [
            await client.get(f"{base}/overview"),
            await client.get(f"{base}/global-parameters"),
            await client.put(f"{base}/users/{mallory.name}", json={"tags": "administrator", "password": "x"}),
        ]
    return ", ".join(sorted({str(answer.status_code) for answer in answers}))


@attack("opens another vhost", expected="530 NOT_ALLOWED", rule="permissions are for one vhost")
async def another_vhost(field: Battlefield) -> str:
    mallory = await field.mallory(0)
    try:
        async with mallory.raw(vhost="/"):
            return "opened"
    except ClosedError as exc:
        return str(exc)
