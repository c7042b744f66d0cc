"""The bundled demo model. Serving needs MODEL_DIR only; the other modules retrain and measure it."""

from pathlib import Path

from cluster.config import ClusterConfig

DEMO_DIR: Path = Path(__file__).resolve().parent
MODEL_DIR: Path = DEMO_DIR / "model"


__all__ = ["DEMO_DIR", "MODEL_DIR", "expand_demo"]


def expand_demo(config: ClusterConfig) -> ClusterConfig:
    """`demo` is the bundled model, served under that name."""
    if config.model != "demo":
        return config
    return config.model_copy(update={"model": str(MODEL_DIR), "served_model_name": config.model_name})
