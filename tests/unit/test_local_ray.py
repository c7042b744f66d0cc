"""Which Ray is trusted with the API key: RAY_ADDRESS, and the one that this user or root has left running."""

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cli.local_ray import reachable_address

OTHER = 4711


@pytest.fixture
def address() -> Iterator[str]:
    """Something of ours listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def note(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `ray start` leaves it, in a directory that it has opened to everybody."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray").chmod(0o777)
    path = tmp_path / "ray/ray_current_cluster"
    path.write_text(address)
    path.chmod(0o644)
    return path


def refused(caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.WARNING):
        assert reachable_address() is None
    return caplog.text


def test_our_own_is_used(note: Path, address: str, caplog: pytest.LogCaptureFixture) -> None:
    assert reachable_address() == address
    note.unlink()
    assert refused(caplog) == ""


def test_one_that_has_ended_is_passed_over_in_silence(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as silent:  # has the port, so that nobody else gets it
        silent.bind(("127.0.0.1", 0))
        note.write_text(f"127.0.0.1:{silent.getsockname()[1]}")
        assert refused(caplog) == ""


def test_what_others_may_write_to_is_not_used(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    note.chmod(0o666)
    assert f"{note} is not used: other users may write to it; RAY_ADDRESS=" in refused(caplog)


def test_a_link_is_not_used(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    note.symlink_to(note.rename(note.with_name("elsewhere")))
    assert "it is a link" in refused(caplog)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_is_not_used(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.chown(note, OTHER, OTHER)
    assert f"it belongs to user {OTHER}" in refused(caplog)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_port_that_another_user_has_taken_since_is_not_used(note: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.seteuid(OTHER)
    try:
        server = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    with server:
        port = server.getsockname()[1]
        note.write_text(f"127.0.0.1:{port}")
        assert f"user {OTHER} listens at the address in it, 127.0.0.1:{port}" in refused(caplog)


def test_the_address_that_the_user_names_is_trusted(
    note: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    note.chmod(0o666)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert reachable_address() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert refused(caplog) == ""
