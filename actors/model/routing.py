"""The mixture-of-experts block as the front sees it: route -> dispatch -> run_experts (elsewhere) -> combine.

Shapes: T tokens, D hidden, E experts, K top-k.
"""

from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor

from actors.dispatch.dispatcher import Dispatcher
from actors.model.layers import AnyLinear

T = TypeVar("T")


def route(x_TD: Tensor, router: AnyLinear, top_k: int) -> tuple[Tensor, Tensor]:
    """Each token's experts and their gates: (ids_TK int64, gates_TK as x).

    Logits in the model's type, compared and normalised in float32 over the chosen k only.
    """
    logits_TE = router(x_TD).float()
    top_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    return ids_TK, torch.softmax(top_TK, dim=-1).to(x_TD.dtype)


def interleave(micro_batches: list[Generator[Any, Tensor, T]], dispatcher: Dispatcher) -> list[T]:
    """Take micro-batches through the layers in turn: each computes while the experts of the others are at work.

    A micro-batch yields what it has dispatched and goes on with what that combines to. They stay in their order, so a
    later one finds in the KV cache what an earlier one has written in the same layer. Returns their results.
    """
    open_: dict[int, Any] = {}
    results: list[T] = []
    try:
        for number, each in enumerate(micro_batches):
            open_[number] = next(each)
        while open_:
            for number, each in enumerate(micro_batches):
                combined_TD = dispatcher.combine(open_.pop(number))
                try:
                    open_[number] = each.send(combined_TD)
                except StopIteration as end:
                    results.append(end.value)
    finally:
        for pending in open_.values():
            dispatcher.forget(pending)
    return results
