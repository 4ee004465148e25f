"""Which commit is recorded: the project's own, never that of another repository around it."""

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mvd import version


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A git repository with one commit, and no settings of the user's."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(logging.getLogger("mvd"), "propagate", True)  # whatever other tests configured
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    me = ("-c", "user.name=me", "-c", "user.email=me@localhost")
    for arguments in (("init", "--quiet"), ("add", "."), (*me, "commit", "--quiet", "--message", "first")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def commit_of(folder: Path) -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkout_is_recorded_with_what_was_changed(repository, monkeypatch):
    monkeypatch.setattr(version, "PROJECT", repository)
    assert version.code_version() == {"commit": commit_of(repository), "diff": ""}
    (repository / "code.py").write_bytes(b"x = '\xff'\n")
    assert "+x = '\ufffd'" in version.code_version()["diff"]


def test_a_repository_around_the_installed_package_is_not_the_project_s(repository, monkeypatch, caplog):
    packages = repository / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setattr(version, "PROJECT", packages)
    assert version.code_version() == {"commit": None, "diff": None, "note": f"{packages} is not a git checkout"}
    (packages / ".git").mkdir()  # empty, so that git goes on to the folders above
    found = version.code_version()
    assert found["commit"] is None and found["note"].endswith(f"only inside that of {repository}")
    assert not caplog.records


def test_variables_of_git_do_not_lead_to_another_repository(repository, tmp_path, monkeypatch):
    other = shutil.copytree(repository, tmp_path / "other")
    me = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    subprocess.run(["git", *me, "commit", "--quiet", "--allow-empty", "--message", "second"], cwd=other, check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setattr(version, "PROJECT", repository)
    found = version.code_version()
    monkeypatch.delenv("GIT_DIR")
    assert found["commit"] == commit_of(repository) != commit_of(other)


def test_a_clone_of_another_user_says_how_to_have_it_recorded(repository, tmp_path, monkeypatch, caplog):
    """git itself refuses; its own test switch stands in for the other user."""
    wrapper = tmp_path / "bin" / "git"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nGIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec {shutil.which("git")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(version, "PROJECT", repository)
    found = version.code_version()
    assert found["commit"] is None and found["diff"] is None
    assert f"belongs to another user; run `git config --global --add safe.directory {repository}`" in found["note"]
    assert [record.getMessage() for record in caplog.records] == [found["note"]]
    subprocess.run(["git", "config", "--global", "--add", "safe.directory", str(repository)], check=True)
    assert version.code_version()["commit"]


def test_without_git_the_reason_is_recorded(repository, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(version, "PROJECT", repository)
    assert "git cannot be run (No such file or directory)" in version.code_version()["note"]
    assert len(caplog.records) == 1
