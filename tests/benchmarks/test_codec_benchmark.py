import json
import sys

import numpy as np
import pytest

from benchmarks import codec
from benchmarks.codec import Row, besides, delta, entropy_bits, goals, measure, model, naive_payload
from broker_fl.codecs.registry import QUANTIZERS, SPARSIFIERS


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(measure((20_000,), (0.05, 1.0), None))


@pytest.mark.parametrize("parameters", [20_000, *codec.PARAMETERS])
def test_a_model_has_as_many_parameters_as_it_should_in_large_and_small_tensors(parameters):
    manifest = model(parameters)
    assert manifest.size == parameters
    assert min(tensor.size for tensor in manifest.tensors) <= 1024 < max(tensor.size for tensor in manifest.tensors)


def test_every_sparsifier_and_quantizer_is_measured(rows):
    stages = [stage.partition(":")[0] for row in rows for stage in row.codec.split("+")]
    assert set(stages) == {*SPARSIFIERS, *QUANTIZERS}


def test_bits_are_compared_with_what_is_sent(rows):
    for row in rows:
        sends_indices = row.density < 1 and not row.codec.startswith("randomk")
        assert (row.index_bits_ratio is not None) == sends_indices
        assert 0.99 < row.value_bits_ratio < 2
        assert row.bytes < row.naive_bytes or row.codec.endswith(("float32", "float16"))


def test_the_sizes_and_times_of_a_row_are_its_ratios(rows):
    for row in rows:
        assert row.encode_speedup == row.naive_encode_s / row.encode_s
        assert row.merge_speedup == row.dense_merge_s / row.decode_merge_s


def test_the_entropy_is_that_of_the_histogram():
    assert entropy_bits(np.array([0, 1, 2, 3] * 10, np.uint8)) == pytest.approx(80)
    assert entropy_bits(np.array([5] * 10, np.uint8)) == 0


def test_the_naive_way_sends_the_largest_as_integers_and_floats():
    vector = delta(model(20_000))
    payload = naive_payload(vector, 0.01)
    indices = np.frombuffer(payload, "<u4", count=200)
    assert np.frombuffer(payload, "<f4", offset=800).tolist() == vector[indices].tolist()
    assert sorted(indices) == sorted(np.argsort(np.abs(vector))[-200:])


def test_goals_are_judged_by_the_worst_row(rows):
    (indices,) = goals(rows)
    assert str(indices).startswith("FAILS:" if max(row.index_bits_ratio or 0 for row in rows) > 1.02 else "holds:")
    assert "index bits <= 1.02 x limit" in str(indices)


def test_what_stands_beside_is_one_line_for_a_size_and_density(rows):
    assert [(beside.parameters, beside.density) for beside in besides(rows)] == [(20_000, 0.05), (20_000, 1.0)]


def test_the_command_writes_its_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--parameters", "20000", "--densities", "0.01", "--codecs", "int4", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["codec", *arguments])
    codec.main()
    written = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["codec"].partition(":")[0] for row in written] == ["topk", "topk-per-tensor", "randomk", "threshold"]
    expected = "parameters density codec bytes index_bits_ratio encode_s decode_s naive_encode_s decode_merge_s dense_merge_s"
    assert set(expected.split()) <= set(written[0])
    assert "topk:0.01+int4" in capsys.readouterr().out
