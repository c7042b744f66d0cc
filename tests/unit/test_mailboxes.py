"""Outputs wait for an ingress until it has acknowledged them, or has been silent for too long."""

import asyncio
from dataclasses import replace

import pytest

from actors.front import mailboxes as mailboxes_module
from actors.front.mailboxes import LEASE_S, Mailbox, Mailboxes
from cluster.messages.requests import RequestOutput, TokenLogprob

OUTPUTS = [RequestOutput("r", (token,)) for token in range(4)]


def tokens(outputs: tuple[RequestOutput, ...]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def test_what_was_not_acknowledged_comes_again() -> None:
    mailbox = Mailbox()
    mailbox.put(OUTPUTS[:2])
    for _ in range(2):
        delivery = await mailbox.take(0, 1)
        assert (delivery.first, tokens(delivery.outputs)) == (1, [0, 1])
    mailbox.put(OUTPUTS[2:])
    delivery = await mailbox.take(1, 1)
    assert (delivery.first, tokens(delivery.outputs)) == (2, [1, 2, 3])
    assert (await mailbox.take(4, 0.01)).outputs == ()
    assert mailbox.num_outputs == 0


async def test_an_old_acknowledgement_brings_nothing_back() -> None:
    mailbox = Mailbox()
    mailbox.put(OUTPUTS)
    await mailbox.take(3, 1)
    delivery = await mailbox.take(1, 1)
    assert (delivery.first, tokens(delivery.outputs)) == (4, [3])


async def test_two_polls_at_a_time_lose_nothing() -> None:
    """The caller of the older one has gone, and only one of the two answers arrives."""
    mailbox = Mailbox()
    old, new = (asyncio.create_task(mailbox.take(0, 5)) for _ in range(2))
    await asyncio.sleep(0)
    mailbox.put(OUTPUTS)
    await old
    assert tokens((await new).outputs) == [0, 1, 2, 3]


SCORES = (None, *(TokenLogprob(token, -1.0, 1, ((1, -0.5), (2, -0.7))) for token in range(9)))


async def test_scores_of_a_long_prompt_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three log-probabilities for each of its tokens, and no more than seven of them in a message."""
    monkeypatch.setattr(mailboxes_module, "MAX_LOGPROBS", 7)
    mailbox, whole = Mailbox(), RequestOutput("r", (4,), prompt_logprobs=SCORES, finish_reason="length")
    mailbox.put([whole, *OUTPUTS])
    came: list[RequestOutput] = []
    while mailbox.num_outputs:
        delivery = await mailbox.take(len(came), 0.01)
        assert delivery.first == len(came) + 1
        assert sum(output.num_logprobs for output in delivery.outputs) <= 7
        came += delivery.outputs
    parts, last = [output for output in came if output.is_part], came[-len(OUTPUTS) - 1]
    assert [output.token_ids for output in parts] == [()] * 4
    assert tuple(score for output in (*parts, last) for score in output.prompt_logprobs or ()) == SCORES
    assert replace(last, prompt_logprobs=SCORES) == whole
    assert tokens(tuple(came)) == [4, 0, 1, 2, 3]


async def test_what_is_too_long_for_a_message_comes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailboxes_module, "MAX_LOGPROBS", 7)
    mailbox, long = Mailbox(), RequestOutput("r", (1,), (TokenLogprob(1, -1.0, 1, ((2, -0.5),) * 9),))
    mailbox.put([long, long])
    assert [len((await mailbox.take(number, 1)).outputs) for number in (0, 1)] == [1, 1]


async def test_silence_ends_a_lease() -> None:
    now = 0.0
    mailboxes = Mailboxes(lambda: now)
    for lease in ("polled", "silent"):
        mailboxes.open(lease)
    now = LEASE_S - 1
    polled = mailboxes.get("polled")
    assert polled is not None
    await polled.take(0, 0.01)
    now = LEASE_S + 1
    assert mailboxes.expire() == ["silent"]
    assert mailboxes.get("silent") is None
    assert mailboxes.get("polled") is polled
