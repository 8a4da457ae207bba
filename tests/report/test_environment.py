"""The record of versions, devices and commit at each start of a run."""

import json
import subprocess
import sys

import jax
import pytest

from jaxft.report import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_environment_appends_each_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "configs/that.py"])
    environment.append(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "configs/that.py", "--workers", "4"])
    environment.append(tmp_path)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert first["command"] == ["finetune.py", "configs/that.py"]
    assert second["command"][-1] == "4"
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"]["python"] == sys.version.split()[0]
    assert (first["platform"], first["processes"]) == ("cpu", 1)
    assert first["devices"] == jax.device_count()
    assert {path.name for path in tmp_path.iterdir()} == {"environment.json"}


@pytest.mark.parametrize("content", ["", '{"versions": ', "3"])
def test_environment_replaces_an_unreadable_file(content, tmp_path):
    (tmp_path / "environment.json").write_text(content)
    environment.append(tmp_path)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_environment_commit_of_the_code(tmp_path, monkeypatch):
    commit = environment._commit
    assert commit(tmp_path) is None  # no repository
    git(tmp_path, "init", "-q")
    (tmp_path / "train.py").write_text("")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "jaxft.py").write_text("")
    assert commit(tmp_path) is None  # nothing is tracked yet
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-q", "-m", "All")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert commit(tmp_path) == clean
    assert commit(tmp_path / "venv") is None
    (tmp_path / "train.py").write_text("changed")
    assert commit(tmp_path) == {**clean, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None  # no git
