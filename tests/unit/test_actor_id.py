"""How actors are called."""

import pytest

from cluster.actor_id import ActorId, slot_of


@pytest.mark.parametrize(
    ("text", "actor_id", "slot"),
    [
        ("front-0", ActorId(None, 0), "front-0"),
        ("front-12.3", ActorId(None, 12, 3), "front-12"),
        ("expert-g1-r0", ActorId(1, 0), "expert-g1-r0"),
        ("expert-g10-r2.40", ActorId(10, 2, 40), "expert-g10-r2"),
    ],
)
def test_a_name_is_a_place_and_how_often_it_was_filled_anew(text: str, actor_id: ActorId, slot: str) -> None:
    assert ActorId.parse(text) == actor_id
    assert str(actor_id) == text
    assert actor_id.slot == slot_of(text) == slot
    assert actor_id.kind == text.partition("-")[0]


@pytest.mark.parametrize(
    "text", ["", "front", "front-", "front-x", "front-0.", "front-0.1.2", "expert-g1", "a-1", "front-0\n"]
)
def test_other_names_are_none_of_ours(text: str) -> None:
    with pytest.raises(ValueError, match="names no actor"):
        ActorId.parse(text)
