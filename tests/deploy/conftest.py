"""What deploy/make_secrets.sh makes, for all who look at it."""

from pathlib import Path

import pytest
from deployment import make_secrets


@pytest.fixture(scope="session")
def secrets_folder(tmp_path_factory) -> Path:
    """For broker.example.org."""
    folder = tmp_path_factory.mktemp("deploy")
    ended = make_secrets(folder, "broker.example.org")
    assert ended.returncode == 0, ended.stderr
    return folder / "secrets"
