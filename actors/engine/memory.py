"""How large a front's KV cache is, from the options and from what the machine has."""

import torch

from actors.model.paged_kv import PagedKV
from cluster.messages import EngineOptions
from cluster.model_config import GraniteMoeConfig, ModelError

GIB = 2**30
# Without a setting, a CPU front takes at most this: weights and other processes share the memory.
CPU_DEFAULT = GIB // 2


def num_kv_blocks(options: EngineOptions, config: GraniteMoeConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Blocks that fit the budget; never more than max_num_seqs sequences of full length could use.

    Raises ModelError if not even one sequence of max_model_len tokens fits.
    """
    block = PagedKV.bytes_per_block(config, options.block_size, dtype)
    needed = -(-options.max_model_len // options.block_size)
    budget = options.kv_cache_bytes or _default_budget(options, device, needed * block)
    if budget < needed * block:
        raise ModelError(
            f"kv_cache_gib={budget / GIB:.3g} holds {budget // block * options.block_size} tokens, fewer than "
            f"max_model_len={options.max_model_len}: set kv_cache_gib to {needed * block / GIB:.3g} or more, "
            "or lower max_model_len"
        )
    return min(budget // block, needed * options.max_num_seqs)


def _default_budget(options: EngineOptions, device: torch.device, least: int) -> int:
    if device.type == "cuda":  # not yet run on a GPU
        free, total = torch.cuda.mem_get_info()
        return int(free - (1 - options.gpu_memory_utilization) * total)
    return max(CPU_DEFAULT, least)
