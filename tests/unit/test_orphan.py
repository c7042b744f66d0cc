"""When an actor ends itself, on a clock of the test's own."""

import pytest

from actors.process.orphan import SILENCE_S, OrphanWatch


@pytest.mark.parametrize(
    ("silent_for", "is_deleted", "ends"),
    [(SILENCE_S - 1, True, 0), (SILENCE_S + 1, False, 0), (SILENCE_S + 1, True, 1)],
)
def test_an_actor_ends_once_both_supervisor_and_application_are_gone(
    silent_for: float, is_deleted: bool, ends: int
) -> None:
    now, ended = [0.0], []
    watch = OrphanWatch(lambda: is_deleted, lambda: ended.append(1), lambda: now[0])
    now[0] = 1000
    watch.hear()
    now[0] += silent_for
    watch.check()
    assert len(ended) == ends
