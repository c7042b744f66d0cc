"""The machine: driver, devices, what is chosen to compute with and why, memory, and a thread of its own."""

import threading
from pathlib import Path
from typing import Any

import torch

from actors.compute import Compute, describe
from actors.engine.memory import CUDA_CONTEXT, gpu_budget, num_kv_blocks
from actors.model.paged_kv import PagedKV
from actors.staging import staging_for
from benchmarks.gpu_check.check import Check, Trial
from benchmarks.make_checkpoint import SHAPES
from cluster.errors import ConfigError
from cluster.messages.actors import EngineOptions
from cluster.models.family import parse_config

GIB = 2**30
# Of bfloat16 on tensor cores, and of flash attention 2.
LEAST_CAPABILITY = (8, 0)
DRIVER = Path("/proc/driver/nvidia/version")


def driver_version() -> str:
    """As the kernel module says it; empty without one."""
    return DRIVER.read_text().splitlines()[0].partition("NVRM version:")[2].strip() if DRIVER.exists() else ""


def unusable_driver() -> str:
    """Why torch can't use the GPU of a machine that has a driver for one; empty if there is none."""
    driver = driver_version()
    if not driver:
        return ""
    if torch.version.cuda is None:
        return f"driver {driver}, but this torch is built for CPUs: install a CUDA build of torch {torch.__version__}"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # such as a driver that is too old: torch says which version it found
        return f"driver {driver}, torch for CUDA {torch.version.cuda}: {str(error).partition(chr(10))[0]}"
    return f"driver {driver}, torch for CUDA {torch.version.cuda}: no device is visible (CUDA_VISIBLE_DEVICES?)"


def gpus() -> list[dict[str, Any]]:
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "gib": round(gpu.total_memory / GIB, 1)}
        for gpu in found
    ]


def choices(trial: Trial) -> None:
    trial.figures["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}"
    compute = Compute.choose(trial.device.type, "bfloat16")
    if not trial.is_on_gpu:
        trial.figures |= dict(line.split(": ", 1) for line in describe(compute, "auto"))
        return
    trial.figures["driver"] = driver_version() or "unknown"
    trial.figures["GPUs"] = ", ".join("{name}, capability {capability}, {gib} GiB".format(**gpu) for gpu in gpus())
    trial.figures["bfloat16"] = f"attention {compute.attention}, linear {compute.linears}, experts {compute.experts}"
    trial.figures["float32"] = f"attention {Compute.choose('cuda', 'float32').attention}"
    capability = torch.cuda.get_device_capability()
    needed, has = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, capability))
    trial.expect(capability >= LEAST_CAPABILITY, f"capability {has}: flash attention and bfloat16 want {needed}")
    trial.expect(compute.attention == "flash", f"attention is {compute.attention}, not flash")


def int8(trial: Trial) -> None:
    """Experts in int8 are for CPUs and bfloat16."""
    dtype = "bfloat16" if trial.is_on_gpu else "float32"
    try:
        Compute.choose(trial.device.type, dtype, expert_dtype="int8")
    except ConfigError as error:
        trial.figures["says"] = str(error)
    else:
        trial.expect(False, f"int8 experts were not refused on {trial.device.type} in {dtype}")


def worker_thread(trial: Trial) -> None:
    """Engine and replica compute in threads that did not start CUDA, with staging that another thread has made."""
    found: list[float] = []
    staging = staging_for(trial.device)

    def compute() -> None:
        (numbers,) = staging.upload(torch.arange(1000.0))
        (total,) = staging.download(numbers.sum())
        found.append(float(total))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join(timeout=60)
    trial.expect(found == [499500.0], f"a thread computed {found}, not 499500")


def memory(trial: Trial) -> None:
    """Before anything large is loaded: what the device's memory has lost so far is context and other processes."""
    spec, compute = parse_config(SHAPES["1b-a400m"]), Compute.choose(trial.device.type, "bfloat16")
    size = 256 if trial.is_on_gpu else 16
    options = EngineOptions(
        model_path="", device=trial.device.type, expert_device="cpu", dtype="bfloat16", max_model_len=4096,
        block_size=size, kv_cache_bytes=None, gpu_memory_utilization=0.9, max_num_batched_tokens=None,
        max_num_seqs=256, max_num_waiting=256, enable_prefix_caching=True, kernels="auto", expert_dtype="auto",
        cuda_graphs=False, num_threads=1,
    )  # fmt: skip
    blocks = num_kv_blocks(options, spec, compute)
    trial.figures["KV cache of a 1b-a400m front"] = f"{blocks * size} tokens"
    trial.figures["bytes a token"] = PagedKV.bytes_per_block(spec, size, compute.dtype) // size
    if trial.is_on_gpu:
        free, total = torch.cuda.mem_get_info()
        taken = total - free - torch.cuda.memory_reserved()
        trial.figures["GPU memory"] = f"{total / GIB:.1f} GiB, free {free / GIB:.1f}"
        trial.figures["context and other processes"] = f"{taken / GIB:.2f} GiB (assumed {CUDA_CONTEXT / GIB:.2f})"
        whole, half = (gpu_budget(0.9, share) for share in (1.0, 0.5))
        trial.figures["budget"] = f"{whole / GIB:.1f} GiB, with half a GPU {half / GIB:.1f}"
        trial.expect(0 < half <= whole <= free, "the budget is more than what is free, or nothing")


CHECKS = (
    Check("machine", "what computes here, and why", choices),
    Check("thread", "a thread that did not start CUDA can use it", worker_thread),
    Check("memory", "room for keys and values", memory),
    Check("int8", "int8 experts are refused where they can't be had", int8),
)
