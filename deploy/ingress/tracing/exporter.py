"""Whether requests are traced. OpenTelemetry is an extra, and imported only if they are."""

from typing import TYPE_CHECKING

from cluster.config import ClusterConfig
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from deploy.ingress.tracing.spans import Tracing


def check_tracing(config: ClusterConfig) -> None:
    """Raises ConfigError if traces are asked for, and what sends them is missing here. Imports no Ray."""
    if config.otlp_traces_endpoint is None:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint={config.otlp_traces_endpoint!r} needs OpenTelemetry ({error}): "
            "pip install 'outcrop[otel]'"
        ) from None


def open_tracing(config: ClusterConfig) -> "Tracing | None":
    """Raises ConfigError."""
    if config.otlp_traces_endpoint is None:
        return None
    check_tracing(config)
    from deploy.ingress.tracing.spans import Tracing

    return Tracing.to(config.otlp_traces_endpoint, config.model_name)
