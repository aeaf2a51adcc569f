import pytest

from benchmarks.enrolment import measured


@pytest.mark.rabbitmq
async def test_everything_is_measured_and_cut_off_in_time():
    made = {row.what: row for row in await measured(20)}
    assert list(made) == [
        "enrol",
        "enrol again",
        "list",
        "register, for an aggregator",
        "register, again",
        "enrol one more",
        "show one",
        "suspend one: cut off",
        "rotate one: cut off",
        "remove one: cut off",
    ]
    assert made["enrol"].parties == 20
    assert all(row.seconds < 5 for what, row in made.items() if what.endswith("cut off"))
