"""ExpertActor: a thin Ray class around ExpertStore. Stateless towards requests: same inputs, same outputs.

torch is imported when an actor starts, so that the supervisor can name this class without loading it.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from actors.threads import limit_threads
from cluster.messages import ActorReport, LoadProgress, ReadyReport, ReplicaSpec
from cluster.metrics import Metrics

if TYPE_CHECKING:
    from actors.model.expert_half import ExpertStore


class ExpertActor:
    """Computes one message at a time; calls of the group "control" are answered meanwhile."""

    def __init__(self, spec: ReplicaSpec) -> None:
        limit_threads(spec.num_threads)
        self.spec = spec
        self.metrics = Metrics()
        self.store: ExpertStore | None = None
        self._loaded = 0
        self._total = 0
        self._tokens = 0

    def load(self) -> ReadyReport:
        """Read this replica's experts, and nothing else, from the checkpoint."""
        from actors.model.device import torch_device, torch_dtype
        from actors.model.loader import load_experts
        from cluster.checkpoint import check_checkpoint
        from cluster.model_config import read_model_config

        started = time.monotonic()
        model_dir = Path(self.spec.model_path)
        config = read_model_config(model_dir)
        per_expert = check_checkpoint(model_dir, config).bytes_per_expert
        self._total = per_expert * sum(len(layer) for layer in self.spec.experts)
        device, dtype = torch_device(self.spec.device), torch_dtype(self.spec.dtype)
        self.store = load_experts(model_dir, config, self.spec.experts, device, dtype, self._advance)
        seconds = time.monotonic() - started
        return ReadyReport(self.spec.actor_id, *where_am_i(), weight_bytes=self._total, load_seconds=seconds)

    def _advance(self, num_bytes: int) -> None:
        self._loaded += num_bytes

    def run_experts(self, frame: bytes) -> bytes:
        """Answer a packed dispatch with a packed partial, or with the reason why not."""
        import torch

        from actors.lanes import wire
        from actors.model.expert_half import NotHeld

        started = time.monotonic()
        if self.store is None:
            return wire.pack_refusal(wire.FAILED, f"{self.spec.actor_id} has not loaded its experts yet")
        try:
            message = wire.unpack_dispatch(frame)
            with torch.inference_mode():
                partial = self.store.run(message.layer, message.x_TD, message.ids_TK.long(), message.gates_TK)
        except NotHeld as error:
            return wire.pack_refusal(wire.NOT_HELD, str(error), error.expert)
        except Exception as error:
            return wire.pack_refusal(wire.FAILED, f"{type(error).__name__}: {error}")
        seconds = time.monotonic() - started
        self._count(len(message.x_TD), seconds)
        return wire.pack_partial(partial, seconds)

    def _count(self, num_tokens: int, seconds: float) -> None:
        group = str(self.spec.group)
        self._tokens += num_tokens
        self.metrics.inc("expert_tokens_total", num_tokens, group=group, replica=self.spec.actor_id)
        self.metrics.observe("expert_compute_seconds", seconds, group=group)

    @ray.method(concurrency_group="control")
    def progress(self) -> LoadProgress:
        return LoadProgress(self._loaded, self._total)

    @ray.method(concurrency_group="control")
    def report(self) -> ActorReport:
        return ActorReport(self.spec.actor_id, 0, self._tokens, self.metrics.samples())


def where_am_i() -> tuple[str, int, str]:
    """(node address, process id, GPU ids) of the calling actor."""
    gpus = ",".join(str(gpu) for gpu in ray.get_gpu_ids())
    return ray.util.get_node_ip_address(), os.getpid(), gpus
