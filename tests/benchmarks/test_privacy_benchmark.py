import json
import sys

import pytest
import torch

from benchmarks.privacy.__main__ import cases, main, measured
from benchmarks.privacy.subjects import load_subject


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The benchmark's own choice: more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load_subject("digits", "linear", folder=None, validate=False)


def test_each_row_learns_within_its_budget(digits):
    rows = {(case.setting, case.epsilon): measured(digits, case, seed=1) for case in cases({}, quick=True)}
    assert set(rows) == {(setting, epsilon) for setting in ("central", "10 parties") for epsilon in (8.0, None)}
    for (setting, epsilon), row in rows.items():
        assert (row.task, row.model, row.setting, row.epsilon) == ("digits", "linear", setting, epsilon)
        assert 0.3 < row.accuracy <= 1
        if epsilon is None:
            assert (row.epsilon_spent, row.noise_multiplier, row.max_grad_norm) == (None, None, None)
        else:
            assert 0.9 * epsilon < row.epsilon_spent <= epsilon
    assert rows["central", 8.0].accuracy > rows["10 parties", 8.0].accuracy


def test_rows_can_be_chosen_and_written(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["privacy", "--quick", "--only", "setting=central", "epsilon=8", "--json", str(file)])
    main()
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["task"], row["model"], row["setting"], row["epsilon"]) == ("digits", "linear", "central", 8.0)
    assert f"{row['accuracy']:.4f}" in capsys.readouterr().out


def test_data_that_is_missing_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["privacy", "--data", str(tmp_path), "--only", "task=cifar10", "model=linear"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "cifar10, linear: left out, since" in capsys.readouterr().out
