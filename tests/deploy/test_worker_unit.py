import re
import shutil
import subprocess

import pytest
from deployment import DEPLOY, parse_command

FILE = DEPLOY / "systemd" / "broker-fl-worker@.service"
TEXT = FILE.read_text(encoding="utf-8")
LINES = [line.split("=", 1) for line in TEXT.splitlines() if "=" in line and not line.startswith("#")]
OPTIONS = dict(LINES)

MOST_EXPOSURE = 2.0
"""Of 10, by systemd's own measure."""


def test_the_worker_has_no_rights_but_to_its_state():
    assert OPTIONS["DynamicUser"] == "yes"
    assert OPTIONS["CapabilityBoundingSet"] == OPTIONS["AmbientCapabilities"] == ""
    assert OPTIONS["ProtectSystem"] == "strict"
    assert OPTIONS["StateDirectory"] == "broker-fl/%i"
    assert OPTIONS["StateDirectoryMode"] == "0700"
    assert "ReadWritePaths" not in OPTIONS
    on = ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "PrivateUsers", "ProtectClock", "ProtectControlGroups")
    kernel = ("ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "RestrictNamespaces", "RestrictSUIDSGID")
    assert {OPTIONS[name] for name in (*on, *kernel, "RestrictRealtime", "LockPersonality")} == {"yes"}
    assert set(OPTIONS["RestrictAddressFamilies"].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}


def test_only_root_and_the_worker_read_the_enrolment():
    assert OPTIONS["LoadCredential"] == "enrolment:/etc/broker-fl/%i.toml"
    assert "--enrolment ${CREDENTIALS_DIRECTORY}/enrolment" in OPTIONS["ExecStart"]


def test_it_starts_again_but_where_the_federation_is_over():
    """Which is exit code 0."""
    assert OPTIONS["Restart"] == "on-failure"
    assert OPTIONS["StartLimitIntervalSec"] == "0"
    assert "RestartPreventExitStatus" not in OPTIONS


def test_its_command_is_understood():
    program, *words = OPTIONS["ExecStart"].split()
    assert program == "/opt/broker-fl/bin/broker-fl"
    parse_command(*words)


def test_no_option_is_said_twice_but_those_that_add_up():
    names = [name for name, _ in LINES]
    assert {name for name in names if names.count(name) > 1} <= {"SystemCallFilter"}


@pytest.fixture
def unit(tmp_path):
    """Of a party, running a program that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    file = tmp_path / "broker-fl-worker@a.service"
    file.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", TEXT, flags=re.MULTILINE))
    return file


def test_systemd_understands_every_option(unit):
    ended = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_systemd_finds_little_exposure(unit):
    ended = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit], capture_output=True, text=True, timeout=60
    )
    if "Unknown" in ended.stderr or "unrecognized" in ended.stderr:
        pytest.skip("this systemd measures running units alone")
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", ended.stdout)
    assert found, ended.stderr
    assert float(found[1]) < MOST_EXPOSURE
