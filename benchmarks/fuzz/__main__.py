"""Fuzzing of everything that decodes the bytes of strangers: messages, payloads in every codec, codec names, frames, updates.

Valid encodings are mutated (bits, lengths, truncation, extension, splices, fields); what does something new is mutated further. A
case must end in a value or a DecodeError (names: ConfigurationError; `examine`: a value), within 2 s of processor time, without a
warning and within the memory that its target declares: the larger of the peak that tracemalloc sees (Python's and numpy's) and,
past a slack, the growth of the process. Cases run in a child with a limit on its address space, which tells its parent each case
before it runs it, should it hang or die. Findings are printed with the bytes that repeat them, and make the exit code 1.

    python -m benchmarks.fuzz --seconds 60 [--seed S] [--only PREFIX] [--json FILE]
    python -m benchmarks.fuzz --only TARGET --case HEX|FILE
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from random import Random

from benchmarks.fuzz.fuzzer import Case, Finding, Fuzzer, grouped
from benchmarks.fuzz.runner import fuzz
from benchmarks.fuzz.targets import targets
from benchmarks.report import machine, parser, show

SHOWN_HEX = 4000


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--seed", type=int, default=int(time.time()), help="the clock's, unless given")
    arguments.add_argument("--only", default="", help="targets whose names begin so, as in codec/topk")
    arguments.add_argument("--case", metavar="HEX|FILE", help="this case alone, of the one target that --only names")
    given = arguments.parse_args()
    if not any(target.name.startswith(given.only) for target in targets()):
        arguments.error(f"no target's name begins with {given.only!r}")
    findings = (
        _repeat(given.only, given.case) if given.case is not None else _fuzz(given.seconds, given.seed, given.only, given.json)
    )
    sys.exit(1 if findings else 0)


def _fuzz(seconds: float, seed: int, only: str, json_file: Path | None) -> list[Finding]:
    began = time.monotonic()
    result = fuzz(seconds, seed=seed, only=only)
    rows, reached, findings = result.tallies(), result.reached(), list(result.findings.values())
    rate = sum(tally.executions for tally in rows) / (time.monotonic() - began)
    for finding in findings:
        _show_finding(finding)
    show(f"Seed {seed}: {rate:,.0f} executions/s", rows, json_file=None)
    print("lines reached of the functions entered: " + ", ".join(f"{file} {ran}/{all_}" for file, (ran, all_) in reached.items()))
    print(f"{len(findings)} findings")
    if json_file is not None:
        record = {
            "machine": machine(),
            "seed": seed,
            "seconds": seconds,
            "executions_per_s": rate,
            "rows": [asdict(tally) for tally in rows],
            "lines": reached,
            "findings": [asdict(finding) for finding in findings],
        }
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return findings


def _repeat(name: str, case: str) -> list[Finding]:
    """One case, in this process."""
    (target,) = (target for target in targets() if target.name == name)
    body = Path(case).read_bytes() if Path(case).is_file() else bytes.fromhex(case)
    said: list[Case | Finding] = []
    fuzzer = Fuzzer(grouped([target]), Random(0), said.append)
    with fuzzer.guarded():
        fuzzer.try_case(target, body)
    findings = [each for each in said if isinstance(each, Finding)]
    print("".join(finding.trace for finding in findings) or fuzzer.tallies[target.group])
    return findings


def _show_finding(finding: Finding) -> None:
    case = finding.hex
    if len(case) > SHOWN_HEX:
        path = Path(tempfile.gettempdir()) / f"fuzz-{finding.what.replace('/', '.').replace(' ', '-')}.bin"
        path.write_bytes(bytes.fromhex(case))
        case = str(path)
    print(f"{finding.target}: {finding.what}\n{finding.trace}")
    print(f"repeat: python -m benchmarks.fuzz --only {finding.target} --case {case}\n")


if __name__ == "__main__":
    main()
