"""Exits 0 where a broker-fl process serves its figures in this container: an aggregator or worker, or an evaluator alone."""

import os
import sys
import urllib.request

PORTS = [os.environ.get(f"BROKER_FL_METRICS__{name}", "") for name in ("PORT", "EVALUATOR_PORT")]


def answers(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{int(port)}/metrics", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


sys.exit(not any(answers(port) for port in PORTS))
