import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chaos.faults import FAULTS

pytestmark = [pytest.mark.system, pytest.mark.rabbitmq, pytest.mark.timeout(600)]

SECONDS = 30


def test_short_campaign_loses_and_doubles_nothing(rabbitmq, tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    arguments = ["--minutes", str(SECONDS / 60), "--seed", "4", "--json", str(file), "--keep", str(tmp_path / "kept")]
    done = subprocess.run([sys.executable, "-m", "benchmarks.chaos", *arguments], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert (found["lost"], found["doubled"], found["replay_identical"], found["violations"]) == (0, 0, True, [])
    assert found["confirmed"] == found["merged"] + found["refused"] > 100
    assert found["faults"] == sum(found["faults_by_kind"].values()) >= 4
    assert set(found["faults_by_kind"]) <= set(FAULTS)
