"""Starts of `outcrop serve` in one Ray, one at a time: nobody looks for a place while another one takes it."""

import threading

from ray._private.ray_constants import KV_NAMESPACE_FUNCTION_TABLE
from ray._private.worker import global_worker

from deploy.cli.on_serve import _turn


def actor_classes() -> set[bytes]:
    return set(global_worker.gcs_client.internal_kv_keys(b"ActorClass", KV_NAMESPACE_FUNCTION_TABLE))


def test_a_turn_is_waited_for_also_while_who_has_it_is_ending(ray_session: None) -> None:
    has_turn = threading.Event()
    failures: list[BaseException] = []

    def take_turn() -> None:
        try:
            with _turn():
                has_turn.set()
        except BaseException as error:
            failures.append(error)

    others = actor_classes()
    with _turn():
        for key in actor_classes() - others:  # as Ray does it when a job ends, a moment before its actors are gone
            global_worker.gcs_client.internal_kv_del(key, False, KV_NAMESPACE_FUNCTION_TABLE)
        next_one = threading.Thread(target=take_turn)
        next_one.start()
        assert not has_turn.wait(1.0), "two have it"
        assert not failures
    next_one.join(30)
    assert not failures
    assert has_turn.is_set()
