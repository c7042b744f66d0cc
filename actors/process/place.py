"""Where an actor runs, for the rows of GET /v1/cluster."""

import os

import ray


def where_am_i() -> tuple[str, int, str]:
    """(node address, process id, GPU ids) of the calling actor."""
    gpus = ",".join(str(gpu) for gpu in ray.get_gpu_ids())
    return ray.util.get_node_ip_address(), os.getpid(), gpus
