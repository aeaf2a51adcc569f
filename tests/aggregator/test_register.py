import asyncio

from enrolled_parties import RegisterInMemory, key_of, membership
from structlog.testing import capture_logs

import aggregator.register
from aggregator.register import Members
from aggregator.trust import Suspension

OUT = {"ann": Suspension(1, "its score fell")}


class Silent(RegisterInMemory):
    """Is asked, and never answers."""

    async def one(self, party):
        self.asked.append(party)
        await asyncio.Event().wait()


class TestWhatIsKnown:
    def test_the_newest_revision_counts_whatever_comes_after_it(self):
        members = Members(None)
        members.learn([membership(revision=1), membership(revision=3, tier="probation")])
        with capture_logs() as logs:
            members.learn([membership(revision=2), membership(revision=3, tier="trusted"), membership("bob")])
        assert members.get("ann").membership.tier == "probation"
        assert members.parties() == ["ann", "bob"]
        (told,) = logs
        assert (told["log_level"], told["party"], told["known"], told["found"]) == ("error", "ann", 3, 2)

    def test_what_the_ledger_remembers_may_be_older_than_the_register(self):
        members = Members(None)
        members.learn([membership(revision=2, tier="probation")])
        with capture_logs() as logs:
            members.recall([membership(revision=1), membership("bob")])
        assert members.get("ann").membership.tier == "probation"
        assert members.parties() == ["ann", "bob"]
        assert logs == []

    def test_what_the_ledger_remembers_is_no_register_that_went_back(self):
        members = Members(None)
        with capture_logs() as logs:
            members.recall([membership(revision=2), membership("bob")])
            members.learn([membership(revision=3)])
            members.recall([membership(revision=2)])
        assert logs == []
        assert members.get("ann").membership.revision == 3

    def test_nothing_is_known_of_who_was_never_seen(self):
        members = Members(None)
        assert members.get("ann") is None
        assert members.parties() == []

    async def test_the_register_brings_all(self):
        register = RegisterInMemory("ann", "bob")
        members = Members(register)
        await members.refresh()
        assert members.parties() == ["ann", "bob"]
        register.enrol("ann", public_key=key_of("ann", 2).public)
        await members.refresh()
        assert members.get("ann").membership.public_key == key_of("ann", 2).public

    async def test_a_register_that_forgot_or_went_back_takes_nothing_away(self):
        register = RegisterInMemory("ann", "bob")
        older = register.members["ann"]
        register.enrol("ann", public_key=key_of("ann", 2).public)
        members = Members(register)
        await members.refresh()
        register.members = {"ann": older}
        await members.refresh()
        assert members.get("ann").membership.revision == 2
        assert members.parties() == ["ann", "bob"]

    async def test_a_register_that_is_away_changes_nothing(self):
        register = RegisterInMemory("ann")
        members = Members(register)
        await members.refresh()
        register.is_away = True
        register.enrol("ann")
        with capture_logs() as logs:
            await members.refresh()
            assert (await members.look_up("ann")).membership.revision == 1
            assert await members.look_up("bob") is None
        assert [told["log_level"] for told in logs] == ["warning"] * 3
        register.is_away = False
        await members.refresh()
        assert members.get("ann").membership.revision == 2

    async def test_where_there_is_no_register_nobody_is_asked(self):
        members = Members(None)
        members.learn([membership()])
        await members.refresh()
        assert (await members.look_up("ann")).membership.party == "ann"
        assert await members.look_up("bob") is None
        assert await members.shut_out(OUT) == []

    async def test_it_is_asked_again_and_again(self, monkeypatch):
        monkeypatch.setattr(aggregator.register, "_REFRESH_S", 0.001)
        register = RegisterInMemory("ann")
        members = Members(register)
        refreshing = asyncio.create_task(members.refresh_for_ever())
        async with asyncio.timeout(10):
            while len(register.asked) < 3:  # noqa: ASYNC110 - what is waited for happens by the clock
                await asyncio.sleep(0.001)
        refreshing.cancel()
        assert set(register.asked) == {"all"}


class TestLookingUp:
    async def test_one_party_is_asked_for_once_in_a_while(self):
        register = RegisterInMemory()
        members, loop = Members(register), asyncio.get_running_loop()
        assert await members.look_up("ann") is None
        register.enrol("ann")
        for _ in range(100):
            assert await members.look_up("ann") is None
        assert register.asked == ["ann"]
        members._asked_at["ann"] = loop.time() - aggregator.register._ASK_AGAIN_S
        assert (await members.look_up("ann")).membership.party == "ann"
        assert register.asked == ["ann", "ann"]

    async def test_of_one_party_nothing_follows_for_another(self):
        register = RegisterInMemory("bob")
        members = Members(register)
        assert await members.look_up("ann") is None
        assert (await members.look_up("bob")).membership.party == "bob"

    async def test_a_register_that_does_not_answer_is_not_waited_for_and_not_asked_again_at_once(self, monkeypatch):
        """All updates wait meanwhile, also those of parties that are known."""
        monkeypatch.setattr(aggregator.register, "_ANSWERS_WITHIN_S", 0.01)
        register = Silent()
        members = Members(register)
        members.learn([membership()])
        with capture_logs() as logs:
            async with asyncio.timeout(10):
                for _ in range(20):
                    assert (await members.look_up("ann")).membership.revision == 1
        assert register.asked == ["ann"]
        assert [(told["log_level"], told["reason"]) for told in logs] == [("warning", "no answer")]

    async def test_how_long_an_answer_took_does_not_bring_the_next_question_nearer(self, monkeypatch):
        monkeypatch.setattr(aggregator.register, "_ASK_AGAIN_S", 0.05)
        monkeypatch.setattr(aggregator.register, "_ANSWERS_WITHIN_S", 0.1)
        register = Silent()
        members = Members(register)
        await members.look_up("ann")
        await members.look_up("ann")
        assert register.asked == ["ann"]


class TestShuttingOut:
    async def test_a_party_that_the_ledger_suspended_is_shut_out_once(self):
        register = RegisterInMemory("ann", "bob")
        members = Members(register)
        await members.refresh()
        assert await members.shut_out(OUT) == ["ann"]
        assert register.suspended == [("ann", "its score fell")]
        assert members.get("ann").membership.suspended
        asked = len(register.asked)
        for _ in range(3):
            assert await members.shut_out(OUT) == []
        assert len(register.asked) == asked

    async def test_it_is_tried_again_until_it_is_done(self):
        register = RegisterInMemory("ann")
        members = Members(register)
        await members.refresh()
        register.is_away = True
        with capture_logs() as logs:
            for _ in range(2):
                assert await members.shut_out(OUT) == []
        assert [told["event"] for told in logs] == ["a suspended party keeps its login: `broker-fl party suspend`"] * 2
        register.is_away = False
        assert await members.shut_out(OUT) == ["ann"]

    async def test_one_that_failed_half_way_is_done_again_though_the_register_says_so_already(self):
        """The entry is written first, then the connections are closed."""
        register = RegisterInMemory("ann")
        whole, tries = register.suspend, []

        async def breaks_once(party, reason):
            tries.append(party)
            await whole(party, reason)
            register.is_away = len(tries) == 1
            register._answer("close the connections")

        register.suspend = breaks_once
        members = Members(register)
        await members.refresh()
        assert await members.shut_out(OUT) == []
        register.is_away = False
        await members.refresh()
        assert members.get("ann").membership.suspended
        assert await members.shut_out(OUT) == ["ann"]
        assert await members.shut_out(OUT) == []
        assert tries == ["ann", "ann"]

    async def test_one_that_fails_keeps_nobody_else_in(self):
        register = RegisterInMemory("ann", "bob")
        whole = register.suspend

        async def not_ann(party, reason):
            register.is_away = party == "ann"
            try:
                await whole(party, reason)
            finally:
                register.is_away = False

        register.suspend = not_ann
        assert await Members(register).shut_out({**OUT, "bob": Suspension(1, "too")}) == ["bob"]

    async def test_a_party_that_an_operator_took_back_is_left_in(self):
        """The ledger learns of it by the party's next message, which may be long in coming."""
        register = RegisterInMemory("ann")
        members = Members(register)
        await members.refresh()
        await members.shut_out(OUT)
        register.enrol("ann", suspended=False, reason="")
        # As an aggregator that starts anew: it knows the ledger's members, and the register has not answered yet.
        another = Members(register)
        another.learn([membership()])
        assert another.still_out(OUT) == OUT
        assert await another.shut_out(OUT) == []
        assert another.still_out(OUT) == {}
        await members.refresh()
        assert await members.shut_out(OUT) == []
        assert members.still_out(OUT) == {}
        assert len(register.suspended) == 1
        assert not register.members["ann"].membership.suspended

    async def test_a_party_that_was_taken_back_may_be_suspended_again(self):
        register = RegisterInMemory("ann")
        members = Members(register)
        await members.shut_out(OUT)
        register.enrol("ann", suspended=False, reason="")
        await members.refresh()
        again = {"ann": Suspension(3, "once more")}
        assert members.still_out(again) == again
        assert await members.shut_out(again) == ["ann"]
        assert register.suspended == [("ann", "its score fell"), ("ann", "once more")]

    async def test_a_party_that_an_operator_suspended_meanwhile_is_out(self):
        register = RegisterInMemory("ann")
        register.enrol("ann", suspended=True, reason="by hand")
        members = Members(register)
        assert await members.shut_out(OUT) == []
        assert register.members["ann"].membership.reason == "by hand"
        assert members.still_out(OUT) == OUT

    async def test_a_party_that_is_in_no_register_cannot_be_shut_out_of_the_broker(self):
        register = RegisterInMemory()
        members = Members(register)
        assert await members.shut_out(OUT) == []
        assert register.suspended == []
        assert members.still_out(OUT) == OUT
