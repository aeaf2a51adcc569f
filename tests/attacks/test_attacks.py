"""A party with valid credentials attacks the federation that it is in, while others train.

ATTACK_TABLE=FILE writes what was observed as the table of docs/security.md; for that, run this file alone, on a quiet machine.
"""

import asyncio
import time
from pathlib import Path

import pytest
from attack import Attack
from attacks import ATTACKS
from battlefield import TABLE, Battlefield, Row
from table import documented, markdown

pytestmark = [
    pytest.mark.system,
    pytest.mark.rabbitmq,
    pytest.mark.timeout(300),
]
in_the_field = pytest.mark.asyncio(loop_scope="module")

LEAST_PACE = 0.3 if TABLE else 0.0
"""Of calm: other tests share the machine."""
LONGEST_WAIT_S = 30.0


@in_the_field
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_attack_is_denied_and_the_others_train_on(field: Battlefield, attack: Attack) -> None:
    began = time.time()
    observed = await attack.run(field)
    pace = await field.pace_since(began) if attack.is_long else None
    await field.go_on()
    field.rows.append(Row(attack.name, observed, pace))
    assert observed.startswith(attack.expected_on(field))
    if pace is not None:
        assert pace.ratio >= LEAST_PACE
        assert pace.longest_wait_s <= LONGEST_WAIT_S


@in_the_field
async def test_what_was_observed_is_written_where_it_is_asked_for(field: Battlefield) -> None:
    if TABLE is None:
        pytest.skip("no ATTACK_TABLE names a file")
    await asyncio.to_thread(Path(TABLE).write_text, markdown(field.rows), encoding="utf-8")


def test_document_names_the_attacks_expectations_and_rules_of_these_tests() -> None:
    assert list(documented()) == [(attack.group, attack.name, attack.expected_text, attack.rule) for attack in ATTACKS]
