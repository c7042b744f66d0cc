"""The wire format: what goes in comes out, and nothing else is believed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.lanes import wire
from actors.lanes.step_id import StepId

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
X = torch.ones(1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_round_trip(dtype: torch.dtype) -> None:
    x, gates = torch.randn(5, 12).to(dtype), torch.rand(5, 3).to(dtype)
    ids = torch.randint(-1, 40, (5, 3))
    message = wire.unpack_dispatch(wire.pack_dispatch(7, x, gates, ids))
    assert message.layer == 7
    assert torch.equal(message.x_TD, x)
    assert torch.equal(message.gates_TK, gates)
    assert torch.equal(message.ids_TK.long(), ids)


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1))
def test_a_dispatch_names_its_step(front: int, number: int) -> None:
    step = StepId(front, number)
    assert wire.unpack_dispatch(wire.pack_dispatch(7, X, X, X, step)).step == step


@pytest.mark.parametrize(
    ("actor_id", "name"),
    [
        ("front-0", "front-0:1"),
        ("front-3.2", "front-3.2:1"),
        ("front-255.7", "front-255.7:1"),
        ("front-1.300", "front-1.44:1"),
    ],
)
def test_steps_are_named_as_the_front_is(actor_id: str, name: str) -> None:
    step = StepId.first_of(actor_id).next()
    assert str(step) == name
    assert wire.unpack_dispatch(wire.pack_dispatch(0, X, X, X, step)).step == step


def test_steps_are_counted_round_and_round() -> None:
    last = StepId(5, 2**32 - 1)
    assert wire.unpack_dispatch(wire.pack_dispatch(0, X, X, X, last.next())).step == (5, 0)


def test_layer_and_top_k_reach_as_far_as_their_fields() -> None:
    wide = torch.ones(1, wire.MAX_TOP_K)
    message = wire.unpack_dispatch(wire.pack_dispatch(2**16 - 1, X, wide, wide))
    assert (message.layer, message.ids_TK.shape) == (2**16 - 1, wide.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_round_trip(dtype: torch.dtype) -> None:
    partial = torch.randn(4, 6).to(dtype)
    answer = wire.unpack_partial(wire.pack_partial(partial, 0.25))
    assert answer.status == wire.OK
    assert answer.compute_seconds == 0.25
    assert answer.partial_TD is not None
    assert torch.equal(answer.partial_TD, partial)


def test_slices_are_packed_as_they_look() -> None:
    x = torch.arange(24.0).view(4, 6)
    message = wire.unpack_dispatch(wire.pack_dispatch(0, x[:, ::2], x[:, :2], torch.zeros(4, 2)))
    assert torch.equal(message.x_TD, x[:, ::2])


def test_refusal_round_trip() -> None:
    answer = wire.unpack_partial(wire.pack_refusal(wire.NOT_HELD, "expert 3: não está", 3))
    assert (answer.status, answer.expert, answer.text) == (wire.NOT_HELD, 3, "expert 3: não está")
    assert answer.partial_TD is None


GOOD = wire.pack_dispatch(1, torch.ones(2, 4), torch.ones(2, 2), torch.ones(2, 2), StepId(3, 70000))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"OCD2",
        GOOD[:-1],
        GOOD + b"\0",
        b"XXXX" + GOOD[4:],
        GOOD[:4] + b"\xff\xff" + GOOD[6:],  # dtype
        b"OCD1" + GOOD[4:],  # an older version
        GOOD[:14] + b"\0\0" + GOOD[16:],  # top-k
        GOOD[:14] + b"\xff\xff" + GOOD[16:],
        GOOD[:16] + b"\xff\xff\xff\xff" + GOOD[20:],  # tokens
        GOOD[:16] + b"\0\0\0\0" + GOOD[20:],
        GOOD[:20] + b"\xff\xff\xff\x7f" + GOOD[24:],  # hidden
        wire.pack_partial(torch.ones(2, 4), 0.0),
    ],
)
def test_frames_that_lie_are_refused(frame: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.unpack_dispatch(frame)


@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
@settings(max_examples=300, deadline=None)
def test_garbage_never_does_more_than_raise(noise: bytes, cut: int) -> None:
    for unpack in (wire.unpack_dispatch, wire.unpack_partial):
        for frame in (noise, GOOD[:cut] + noise):
            try:
                unpack(frame)
            except wire.WireError:
                continue
