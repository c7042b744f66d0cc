"""The router: which experts compute a token, and with which gates.

Shapes: T tokens, D hidden, E experts, K top-k.
"""

import torch
from torch import Tensor

from actors.model.layers import AnyLinear
from cluster.models.spec import RouterRule


def route(x_TD: Tensor, router: AnyLinear, top_k: int, rule: RouterRule) -> tuple[Tensor, Tensor]:
    """Each token's experts and their gates: (ids_TK int64, gates_TK as x).

    Logits in the model's type, compared and normalised in float32. Where a softmax goes over all of them, it comes
    first and its results are compared, as in the reference: they may be equal where logits are not.
    """
    logits_TE = router(x_TD).float()
    if rule.softmax_over == "chosen":
        top_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
        return ids_TK, torch.softmax(top_TK, dim=-1).to(x_TD.dtype)
    gates_TK, ids_TK = torch.softmax(logits_TE, dim=-1).topk(top_k, dim=-1)
    if rule.is_normalised:
        gates_TK /= gates_TK.sum(dim=-1, keepdim=True)
    return ids_TK, gates_TK.to(x_TD.dtype)
