"""Hardware for tests of planning: round numbers, so that what is expected can be worked out by hand."""

from typing import Any

from cluster.planning.hardware import HardwareProfile, roofline


def profile(name: str = "box", **changes: Any) -> HardwareProfile:
    """100 GB/s and 10 TFLOP/s; lanes that take 100 us and 10 GB/s; no overheads."""
    speed = {"round_trip_us": 100.0, "hop_us": 20.0, "gb_per_second": 10.0}
    content: dict[str, Any] = {
        "version": 1, "name": name, "source": "measured", "about": "made up", "device": "cpu", "cores": 8,
        "memory_gib": 64.0, "read_gb_per_second": 100.0, "product_tflops": 10.0,
        "linears": roofline(100.0, 10.0), "experts": roofline(100.0, 10.0),
        "attention": {"gb_per_second": 100.0, "tflops": 10.0}, "lanes": {"unix": speed, "zmq": speed},
        "overheads": {"step_us": 0.0, "sequence_us": 0.0, "layer_us": 0.0, "dispatch_us": 0.0},
        "http": {"token_us": 100.0, "request_ms": 1.0},
    }  # fmt: skip
    return HardwareProfile.model_validate(content | changes)
