"""Directories of processes that were killed: they go, and no other does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.leftovers import OWNER, OwnedDirectory, sweep

OWN = "import sys, cluster.leftovers as l; print(l.OwnedDirectory('x-', sys.argv[1]).path, flush=True); input()"


def test_a_directory_goes_once_its_owner_was_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    path = Path(owner.stdout.readline().strip())
    (path / "more").mkdir()
    (path / "more" / "file").touch()
    assert path.stat().st_mode & 0o777 == 0o700
    assert sweep("x-", str(tmp_path)) == [], "its owner lives"
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert sweep("x-", str(tmp_path)) == [str(path)]
    assert not path.exists()


def test_an_owner_removes_its_own(tmp_path: Path) -> None:
    own = OwnedDirectory("x-", str(tmp_path))
    assert sweep("x-", str(tmp_path)) == []
    own.remove()
    own.remove()
    assert not list(tmp_path.iterdir())


def test_what_is_not_surely_ours_stays(tmp_path: Path) -> None:
    """Without the mark, of another name, open to others, or behind a link."""
    for name, mode in (("x-unmarked", 0o700), ("y-named", 0o700), ("x-open", 0o777), ("target", 0o700)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        (tmp_path / name / ("file" if name == "x-unmarked" else OWNER)).touch()
    (tmp_path / "x-link").symlink_to(tmp_path / "target")
    (tmp_path / "x-marked").mkdir(mode=0o700)
    os.symlink(tmp_path / "target" / OWNER, tmp_path / "x-marked" / OWNER)
    before = sorted(tmp_path.rglob("*"))
    assert sweep("x-", str(tmp_path)) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_another_user_s_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x-1"
    path.mkdir(mode=0o700)
    (path / OWNER).touch()
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    assert sweep("x-", str(tmp_path)) == []
    monkeypatch.undo()
    assert sweep("x-", str(tmp_path)) == [str(path)]
