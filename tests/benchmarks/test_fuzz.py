import os
import warnings
from random import Random

import pytest

from benchmarks.fuzz.fuzzer import Case, Finding, Fuzzer, grouped
from benchmarks.fuzz.mutations import mutated
from benchmarks.fuzz.runner import fuzz
from benchmarks.fuzz.samples import CODECS
from benchmarks.fuzz.targets import MIB, Target, targets
from broker_fl.codecs.codec import parse_codec
from broker_fl.codecs.registry import QUANTIZERS, SPARSIFIERS
from broker_fl.errors import DecodeError


def _target(run, name: str = "planted/x") -> Target:
    return Target(name, run, lambda: [b"seed"], lambda _: MIB)


def _found(run, *, steps: int = 3) -> list[Finding]:
    said: list[Case | Finding] = []
    fuzzer = Fuzzer(grouped([_target(run)]), Random(0), said.append, case_s=0.05)
    with fuzzer.guarded():
        for _ in range(steps):
            fuzzer.step()
    return [each for each in said if isinstance(each, Finding)]


def _refuses(body: bytes) -> None:
    raise DecodeError(f"{len(body)} bytes")


def _loops(_: bytes) -> None:
    while True:
        pass


def _dies(body: bytes) -> None:
    if body != b"seed":
        os.abort()


def _planted() -> list[Target]:
    return [_target(_dies)]


def test_values_and_decode_errors_are_no_findings():
    assert _found(len) == []
    assert _found(_refuses) == []


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (lambda body: {}[body], "KeyError at"),
        (lambda _: warnings.warn("odd", RuntimeWarning, stacklevel=1), "RuntimeWarning at"),
        (lambda _: bytes(2 * MIB), "MemoryError"),
        (_loops, "Hang at"),
    ],
)
def test_anything_else_is_a_finding_with_its_bytes(run, what):
    first = _found(run)[0]
    assert first.what.startswith(what)
    assert bytes.fromhex(first.hex) == b"seed"


def test_a_finding_comes_again_only_with_a_shorter_case():
    found = _found(lambda body: {}[body], steps=200)
    lengths = [len(finding.hex) for finding in found]
    assert lengths == sorted(set(lengths), reverse=True)
    assert 1 < len(found) < 10


def test_a_process_that_dies_leaves_its_case():
    result = fuzz(0.1, seed=0, made_by=_planted)
    ((group, what),) = result.findings
    assert (group, what) == ("planted", "the process ended with -6")
    assert bytes.fromhex(result.findings[group, what].hex) != b"seed"


def test_every_sparsifier_and_quantizer_is_a_target():
    stages = [stage.partition(":")[0] for codec in CODECS for stage in codec.split("+")]
    assert set(stages) == {*SPARSIFIERS, *QUANTIZERS}
    assert all(parse_codec(codec) for codec in CODECS)


def test_seeds_are_what_their_targets_accept():
    for target in targets():
        if target.group != "codec" or target.name.endswith("/one"):
            target.run(target.seeds()[0])


def test_the_same_seed_gives_the_same_cases():
    first, again = ([mutated(b"abcdefgh" * 9, [b"other"], Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 150


def test_a_short_run_counts_what_it_did():
    said: list[Case | Finding] = []
    chosen = [target for target in targets() if target.name.startswith(("codec/topk:0.01+int4/mixed", "parts", "examine"))]
    fuzzer = Fuzzer(grouped(chosen), Random(0), said.append)
    with fuzzer.guarded():
        for _ in range(100):
            fuzzer.step()
    assert all(isinstance(each, Case) for each in said)
    assert set(fuzzer.tallies) == {"codec", "parts", "examine"}
    assert all(0 < tally.accepted < tally.executions and 0 < tally.most_memory < 1 for tally in fuzzer.tallies.values())
    assert fuzzer.lines.reached()["codecs/indices.py"][0] > 10
