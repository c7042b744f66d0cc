"""The wire format: what goes in comes out, and nothing else is believed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.lanes import wire

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_round_trip(dtype: torch.dtype) -> None:
    x, gates = torch.randn(5, 12).to(dtype), torch.rand(5, 3).to(dtype)
    ids = torch.randint(-1, 40, (5, 3))
    message = wire.unpack_dispatch(wire.pack_dispatch(7, x, gates, ids))
    assert message.layer == 7
    assert torch.equal(message.x_TD, x)
    assert torch.equal(message.gates_TK, gates)
    assert torch.equal(message.ids_TK.long(), ids)


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


GOOD = wire.pack_dispatch(1, torch.ones(2, 4), torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"OCD1",
        GOOD[:-1],
        GOOD + b"\0",
        b"XXXX" + GOOD[4:],
        GOOD[:4] + b"\xff\xff" + GOOD[6:],  # dtype
        GOOD[:12] + b"\xff\xff\xff\xff" + GOOD[16:],  # tokens
        GOOD[:12] + b"\0\0\0\0" + GOOD[16:],
        GOOD[:16] + b"\xff\xff\xff\x7f" + GOOD[20:],  # hidden
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
