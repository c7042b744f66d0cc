"""The router: which experts compute a token, and with which gates.

Shapes: T tokens, D hidden, E experts, K top-k.
"""

import torch
from torch import Tensor

from actors.model.layers import AnyLinear


def route(x_TD: Tensor, router: AnyLinear, top_k: int) -> tuple[Tensor, Tensor]:
    """Each token's experts and their gates: (ids_TK int64, gates_TK as x).

    Logits in the model's type, compared and normalised in float32 over the chosen k only.
    """
    logits_TE = router(x_TD).float()
    top_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    return ids_TK, torch.softmax(top_TK, dim=-1).to(x_TD.dtype)
