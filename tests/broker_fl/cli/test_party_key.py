from typer.testing import CliRunner

from broker_fl.cli.main import app
from broker_fl.keys import load_key


def _said(folder) -> str:
    ended = CliRunner().invoke(
        app, ["party", "key", "--set", f"security.key={folder / 'federation.key'}"], catch_exceptions=False
    )
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_the_public_key_is_printed_and_the_private_one_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = _said(tmp_path)
    assert first == f"{load_key(tmp_path / 'federation.key').public}\n"
    assert _said(tmp_path) == first
