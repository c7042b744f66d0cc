"""How large a front's KV cache is, from the options and from what the machine has."""

import logging
from collections.abc import Sequence

import torch

from actors.compute import Compute
from actors.engine.host_memory import available_memory
from actors.model.paged_kv import PagedKV
from cluster.errors import ModelError
from cluster.messages.actors import EngineOptions
from cluster.models.spec import ModelSpec

logger = logging.getLogger(__name__)

GIB = 2**30
# Without a setting, the fronts of a host share this much of the memory that is free once all weights are loaded: the
# rest is for what computes, for actors that join later, and for the page cache. A front takes LEAST where there is that
# much, or where nobody tells how much there is.
SHARE, LEAST = 0.5, GIB // 2
# What a process takes of a GPU beside its tensors: context and modules of kernels. An estimate: no GPU has run this.
CUDA_CONTEXT = GIB // 2


def num_kv_blocks(
    options: EngineOptions, spec: ModelSpec, compute: Compute, others: Sequence[int] = (), gpu_share: float = 1.0
) -> int:
    """Blocks that fit the budget; never more than max_num_seqs sequences of full length could use.

    `others`: see cpu_budget; `gpu_share`: see gpu_budget. Raises ModelError if not even one sequence of max_model_len
    tokens fits.
    """
    block = PagedKV.bytes_per_block(spec, options.block_size, compute.dtype)
    needed = -(-options.max_model_len // options.block_size)
    is_on_gpu = compute.device.type == "cuda"
    if options.kv_cache_bytes:
        budget = options.kv_cache_bytes
    elif is_on_gpu:
        budget = gpu_budget(options.gpu_memory_utilization, gpu_share)
    else:
        budget = _host_budget(options, needed * block, others)
    if budget < needed * block:
        raise ModelError(
            f"kv_cache_gib={budget / GIB:.3g} holds {max(0, budget) // block * options.block_size} tokens, fewer than "
            f"max_model_len={options.max_model_len}: set kv_cache_gib to {needed * block / GIB:.3g} or more, "
            f"{'raise gpu_memory_utilization or gpus_per_front, ' if is_on_gpu else ''}or lower max_model_len"
        )
    return min(budget // block, needed * options.max_num_seqs)


def gpu_budget(utilization: float, share: float) -> int:
    """Bytes for the KV cache of a front that has `share` of a GPU (1: all of it), once its weights are loaded. Not yet
    run on a GPU.

    Actors that share a GPU load side by side: what is free at this moment says little, but caps it. The share holds
    this process's weights and scratch memory, and what CUDA itself takes for each process.
    """
    free, total = torch.cuda.mem_get_info()
    return int(min(free, utilization * min(1.0, share) * total - torch.cuda.memory_reserved() - CUDA_CONTEXT))


def _host_budget(options: EngineOptions, least: int, others: Sequence[int]) -> int:
    available = available_memory()
    if available is not None and available < least:
        logger.warning(
            "%.3g GiB of memory are free, one sequence of max_model_len=%d tokens takes %.3g GiB: lower max_model_len",
            available / GIB,
            options.max_model_len,
            least / GIB,
        )
    return max(cpu_budget(available, others), least)


def cpu_budget(available: int | None, others: Sequence[int]) -> int:
    """Bytes for the KV cache of a front beside others on its host.

    `available` is free now. `others` are the sizes of the other fronts' caches there, 0 for those that choose theirs at
    this moment too. Memory is taken when it is first written to, so what the others have chosen may still look free.
    """
    if available is None:
        return LEAST
    num_choosing = 1 + sum(size == 0 for size in others)
    share = int(SHARE * (available - sum(others)) / num_choosing)
    return max(share, min(LEAST, available // num_choosing))
