"""The door: by whom a message is known, what of it is looked at, and what of the refused is kept."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
from enrolled_parties import RegisterInMemory, key_of, membership, signature_of

import aggregator.register
from aggregator.admission import ANONYMOUS, Examined, Refused
from aggregator.decisions import PartBody
from aggregator.gate import QUARANTINED_PER_MINUTE, Gate
from aggregator.reception import Reception, arrive
from aggregator.register import Members
from broker_fl.signing import SIGNATURE
from broker_fl.transports.parts import split
from broker_fl.transports.transport import Delivery
from schemas import wire

LEDGER = "ab" * 16
BASE = type("Base", (), {"version": 0, "digest": "cd" * 32})


def delivered(message, *, user):
    return Delivery(
        body=message.body,
        headers=message.headers,
        message_id=message.message_id,
        user_id=user,
        exchange=message.exchange,
        routing_key="",
        redelivered=False,
        tag=1,
        offset=None,
    )


@dataclass
class Door:
    """A reception with a register of its own, and what comes to it."""

    bench: object
    register: RegisterInMemory = field(default_factory=lambda: RegisterInMemory("ann", "bob"))
    per_minute: int = 0
    signed_for: str | None = LEDGER

    def __post_init__(self):
        self.limits = self.bench.limits(signed_for=self.signed_for)
        self.members = Members(self.register)
        self.threads = ThreadPoolExecutor(2)
        gate = Gate(per_minute=self.per_minute, part_bytes=1024, max_update_bytes=self.limits.max_update_bytes)
        self.reception = Reception(self.limits, self.members, gate, self.threads)

    def update(self, party="ann", **changes):
        return self.bench.update(party, base=BASE, **{"ledger": LEDGER, **changes})

    def delivery(self, update, *, key=None, user="same", **headers):
        """Signed by the party's own key unless another is named, or none by False."""
        signed = {} if key is False else {SIGNATURE: signature_of(update, key)}
        message = replace(self.bench.message(update), headers={**signed, **headers})
        return delivered(message, user=update.party if user == "same" else user)

    async def contents(self, *deliveries):
        return [arrival.content for arrival in await self.reception.examine(deliveries)]

    async def reasons(self, *deliveries):
        return [content.reason if isinstance(content, Refused) else None for content in await self.contents(*deliveries)]


@pytest.fixture
def door(bench):
    made = []

    def new(**changes):
        made.append(Door(bench, **changes))
        return made[-1]

    yield new
    for one in made:
        one.threads.shutdown()


class TestSignatures:
    async def test_what_its_party_signed_is_taken_with_its_signature(self, door):
        one = door()
        update = one.update()
        (arrival,) = await one.reception.examine([one.delivery(update)])
        assert isinstance(arrival.content, Examined)
        assert arrival.content.signature == signature_of(update)
        assert arrival.credentials.membership == one.register.members["ann"]

    async def test_what_nobody_signed_is_refused(self, door):
        one = door()
        (content,) = await one.contents(one.delivery(one.update(), key=False))
        assert content == Refused(
            "signature", f"is not signed by the key {key_of('ann').public[:12]} that party 'ann' was enrolled with"
        )

    @pytest.mark.parametrize("garbage", ["", "00" * 64, "x", 7, True], ids=repr)
    async def test_what_is_no_signature_is_refused(self, door, garbage):
        one = door()
        assert await one.reasons(one.delivery(one.update(), key=False, **{SIGNATURE: garbage})) == ["signature"]

    async def test_what_another_party_signed_is_refused(self, door):
        one = door()
        assert await one.reasons(one.delivery(one.update(), key=key_of("bob"))) == ["signature"]

    async def test_a_signature_of_another_update_is_refused(self, door):
        one = door()
        other = signature_of(one.update(seed=1))
        assert await one.reasons(one.delivery(one.update(), key=False, **{SIGNATURE: other})) == ["signature"]

    @pytest.mark.parametrize("changes", [{"num_samples": 11}, {"train_loss": 0.4}, {"codec": "bfloat16"}, {"base_version": 1}])
    async def test_what_was_changed_on_its_way_is_refused(self, door, changes):
        one = door()
        update = one.update()
        delivery = replace(one.delivery(update), body=wire.encode(update.model_copy(update=changes)))
        assert await one.reasons(delivery) == ["signature"]

    async def test_a_payload_that_was_changed_on_its_way_is_refused(self, door):
        one = door()
        update = one.update()
        payload = bytes([update.payload[0] ^ 1]) + update.payload[1:]
        delivery = replace(one.delivery(update), body=wire.encode(update.model_copy(update={"payload": payload})))
        assert await one.reasons(delivery) == ["signature"]

    async def test_what_was_signed_for_another_ledger_has_no_base_here(self, door):
        """No fault of its party, whose federation began anew; and nobody can have it merged twice."""
        one = door()
        for ledger, said in (("cd" * 16, "cdcdcdcdcdcd"), (None, "none")):
            (content,) = await one.contents(one.delivery(one.update(ledger=ledger)))
            assert content == Refused("base", f"was trained from a frame of ledger {said}, not abababababab")
            assert content.update is None
        assert await one.reasons(one.delivery(one.update(ledger="cd" * 16), key=False)) == ["signature"]

    async def test_a_party_that_is_in_no_register_is_told_so(self, door):
        one = door(register=RegisterInMemory())
        (content,) = await one.contents(one.delivery(one.update()))
        assert content.reason == "signature"
        assert content.detail == "party 'ann' is not in the federation's register: `broker-fl party add` enrols it"

    async def test_a_party_without_a_key_is_told_so(self, door):
        one = door()
        one.register.enrol("ann", public_key=None)
        (content,) = await one.contents(one.delivery(one.update()))
        assert content.reason == "signature"
        assert content.detail == "party 'ann' was enrolled without a key: `broker-fl party rotate` gives it one"

    async def test_where_no_signatures_are_asked_for_none_are_looked_at(self, door):
        one = door(signed_for=None)
        contents = await one.contents(one.delivery(one.update(), key=False), one.delivery(one.update(), key=key_of("bob")))
        assert [content.signature for content in contents] == [None, None]

    async def test_what_says_nothing_true_of_its_party_costs_that_party_no_privacy(self, door):
        one = door()
        (content,) = await one.contents(one.delivery(one.update(), key=False))
        assert content.update is None
        (content,) = await one.contents(one.delivery(one.update(payload=b"")))
        assert (content.reason, content.update.party) == ("codec", "ann")

    async def test_every_message_is_examined_in_its_place(self, door):
        one = door()
        seeds = range(20)
        updates = [one.update("ann" if seed % 2 else "bob", seed=seed) for seed in seeds]
        keys = [False if seed % 5 == 0 else None for seed in seeds]
        deliveries = [one.delivery(update, key=key) for update, key in zip(updates, keys, strict=True)]
        arrivals = await one.reception.examine(deliveries)
        assert [arrival.sender.update_id for arrival in arrivals] == [update.update_id for update in updates]
        refused = [isinstance(arrival.content, Refused) for arrival in arrivals]
        assert refused == [seed % 5 == 0 for seed in seeds]


class TestTheRegister:
    async def test_it_is_asked_once_for_all_messages_of_a_party_that_nobody_knew(self, door):
        one = door()
        assert await one.reasons(*[one.delivery(one.update(seed=seed)) for seed in range(8)]) == [None] * 8
        assert one.register.asked == ["ann"]
        assert await one.reasons(one.delivery(one.update(seed=9))) == [None]
        assert one.register.asked == ["ann"]

    async def test_it_is_not_asked_for_who_is_known_and_signs(self, door):
        one = door()
        one.members.learn(one.register.members.values())
        assert await one.reasons(one.delivery(one.update()), one.delivery(one.update("bob"))) == [None, None]
        assert one.register.asked == []

    async def test_all_messages_of_a_party_with_a_new_key_are_taken_by_a_second_look(self, door):
        one = door()
        one.members.learn(one.register.members.values())
        one.register.enrol("ann", public_key=key_of("ann", 2).public)
        deliveries = [one.delivery(one.update(seed=seed), key=key_of("ann", 2)) for seed in range(4)]
        arrivals = await one.reception.examine([*deliveries, one.delivery(one.update("bob"))])
        assert [isinstance(arrival.content, Examined) for arrival in arrivals] == [True] * 5
        assert {arrival.credentials.membership.membership.revision for arrival in arrivals[:4]} == {2}
        assert one.register.asked == ["ann"]

    async def test_a_key_that_was_given_up_signs_nothing_any_more(self, door):
        one = door()
        one.register.enrol("ann", public_key=key_of("ann", 2).public)
        await one.members.refresh()
        assert await one.reasons(one.delivery(one.update())) == ["signature"]
        # Though the broker says that it was never given up.
        one.register.members["ann"] = membership("ann")
        one.members._asked_at.clear()
        assert await one.reasons(one.delivery(one.update(seed=1))) == ["signature"]

    async def test_a_hostile_party_does_not_make_it_be_asked_for_every_message(self, door):
        one = door()
        for seed in range(10):
            await one.reasons(one.delivery(one.update(seed=seed), key=False))
        assert one.register.asked == ["ann"]

    async def test_one_that_is_away_keeps_out_who_is_not_known_and_nobody_else(self, door):
        one = door()
        one.members.learn([one.register.members["ann"]])
        one.register.is_away = True
        assert await one.reasons(one.delivery(one.update()), one.delivery(one.update("bob"))) == [None, "signature"]

    async def test_one_that_does_not_answer_delays_updates_once(self, door, monkeypatch):
        monkeypatch.setattr(aggregator.register, "_ANSWERS_WITHIN_S", 0.02)
        one = door()
        one.members.learn([one.register.members["bob"]])
        one.register.one = lambda _: asyncio.Event().wait()
        async with asyncio.timeout(10):
            for seed in range(5):
                found = await one.reasons(one.delivery(one.update(seed=seed)), one.delivery(one.update("bob", seed=seed)))
                assert found == ["signature", None]


class TestParts:
    def _parts(self, one, update, **headers):
        message = replace(one.bench.message(update), headers=headers)
        return [delivered(part, user=update.party) for part in split(message, part_bytes=2000, limit_bytes=0)]

    async def test_they_are_put_by_with_what_is_known_of_their_party_and_the_signature_of_the_whole(self, door):
        one = door()
        update = one.update()
        parts = self._parts(one, update, **{SIGNATURE: signature_of(update)})
        arrivals = await one.reception.examine(parts)
        assert len(arrivals) > 2
        assert all(isinstance(arrival.content, PartBody) for arrival in arrivals)
        assert {arrival.credentials.signature for arrival in arrivals} == {signature_of(update)}
        assert {arrival.credentials.membership.membership.party for arrival in arrivals} == {"ann"}

    async def test_one_that_cannot_be_is_refused_without_a_look_at_who_signed(self, door):
        one = door()
        assert await one.reasons(one.delivery(one.update(), key=False, **{"x-fl-part": 3})) == ["parts"]


class TestFloods:
    async def test_what_is_over_its_share_is_refused_unread_and_the_others_are_not(self, door):
        one = door(per_minute=3)
        deliveries = [one.delivery(one.update(seed=seed)) for seed in range(5)]
        unreadable = [replace(delivery, body=b"\xff") for delivery in deliveries[3:]]
        found = await one.reasons(*deliveries[:3], *unreadable, one.delivery(one.update("bob")))
        assert found == [None] * 3 + ["rate"] * 2 + [None]

    async def test_what_the_door_refuses_is_still_somebodys_and_says_who_that_is(self, door):
        one = door(per_minute=1)
        arrivals = await one.reception.examine([one.delivery(one.update(seed=seed)) for seed in range(2)])
        assert arrivals[1].sender.party == "ann"
        assert arrivals[1].credentials.membership.membership.revision == 1

    async def test_who_leaves_out_who_it_is_has_the_same_share(self, door):
        one = door(per_minute=3)
        deliveries = [one.delivery(one.update(seed=seed), user=None) for seed in range(5)]
        arrivals = await one.reception.examine(deliveries)
        assert [arrival.content.reason for arrival in arrivals] == ["identity"] * 3 + ["rate"] * 2
        assert {arrival.sender for arrival in arrivals} == {None}
        assert {arrival.party for arrival in arrivals} == {"ann"}
        assert await one.reasons(one.delivery(one.update(seed=9))) == ["rate"]

    async def test_what_a_suspended_party_sends_is_not_read_and_costs_nothing(self, door):
        one = door(per_minute=2)
        one.reception.shut_out({"ann"})
        unreadable = [replace(one.delivery(one.update(seed=seed)), body=b"\xff") for seed in range(5)]
        assert await one.reasons(*unreadable, one.delivery(one.update("bob"))) == ["suspended"] * 5 + [None]
        one.reception.shut_out(())
        assert await one.reasons(one.delivery(one.update())) == [None]

    async def test_a_party_that_an_operator_suspended_is_out_as_soon_as_the_register_was_read(self, door):
        one = door()
        one.register.enrol("ann", suspended=True)
        await one.members.refresh()
        assert await one.reasons(one.delivery(one.update())) == ["suspended"]

    async def test_a_message_of_nobody_we_know_of_asks_no_register(self, door):
        one = door(per_minute=1)
        strange = replace(one.delivery(one.update()), exchange="fl.other.up.ann")
        false = one.delivery(one.update(), user="bob")
        nameless = replace(one.delivery(one.update()), exchange=one.bench.names.up("A"), user_id="A")
        arrivals = await one.reception.examine([strange, false, nameless])
        assert [arrival.content.reason for arrival in arrivals] == ["identity"] * 3
        assert {arrival.party for arrival in arrivals} == {None}
        assert one.register.asked == []


class TestQuarantine:
    async def test_of_each_partys_exchange_only_so_much_is_kept(self, door):
        one = door()
        of_ann = [one.delivery(one.update(seed=seed)) for seed in range(30)]
        kept = [one.reception.keeps(delivery, Refused("malformed", "")) for delivery in of_ann]
        assert kept == [True] * QUARANTINED_PER_MINUTE + [False] * (30 - QUARANTINED_PER_MINUTE)
        assert one.reception.keeps(one.delivery(one.update("bob")), Refused("malformed", ""))

    async def test_who_leaves_out_who_it_is_drives_out_nobody_either(self, door):
        one = door()
        anonymous = [one.delivery(one.update(seed=seed), user=None) for seed in range(30)]
        assert sum(one.reception.keeps(delivery, Refused("identity", "")) for delivery in anonymous) == QUARANTINED_PER_MINUTE
        for user in ("bob", None):
            assert one.reception.keeps(one.delivery(one.update("bob"), user=user), Refused("identity", ""))

    @pytest.mark.parametrize("reason", ["rate", "suspended"])
    async def test_of_a_flood_nothing_is_kept(self, door, reason):
        one = door()
        assert not one.reception.keeps(one.delivery(one.update()), Refused(reason, ""))
        kept = [one.reception.keeps(one.delivery(one.update()), Refused("base", "")) for _ in range(30)]
        assert sum(kept) == QUARANTINED_PER_MINUTE


def test_a_check_that_fails_is_a_refusal_and_stops_nobody(bench):
    delivery = delivered(bench.message(bench.update(base=BASE)), user="ann")
    broken = replace(bench.limits(), manifest=None)
    arrival = arrive(delivery, broken, ANONYMOUS)
    assert arrival.content.reason == "malformed"
    assert arrival.content.detail.startswith("checking it failed: ")
