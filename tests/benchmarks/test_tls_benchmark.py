import pytest

from benchmarks.tls import Cost, row_of


def test_a_ratio_is_of_rounds_and_not_of_medians():
    plain = [Cost(1.0, 0.1, 0.2), Cost(2.0, 0.1, 0.2), Cost(4.0, 0.1, 0.2)]
    tls = [Cost(2.0, 0.2, 0.3), Cost(8.0, 0.2, 0.3), Cost(5.0, 0.2, 0.3)]
    row = row_of("publish", 2_000_000, plain=plain, tls=tls)
    assert (row.plain_per_s, row.tls_per_s) == (0.5, 0.2)
    assert (row.plain_mb_s, row.tls_mb_s) == (1.0, 0.4)
    assert row.ratio == 0.5
    assert (row.client_cpu_plain_ms, row.client_cpu_tls_ms) == pytest.approx((100, 200))
    assert (row.broker_cpu_plain_ms, row.broker_cpu_tls_ms) == pytest.approx((200, 300))
