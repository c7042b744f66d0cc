"""Errors that are told to people as they are: the message names the field, the value and the way out."""


class ConfigError(ValueError):
    """The configuration can't be used; the message names the field, the value and the way out."""


class ModelError(ValueError):
    """A checkpoint can't be served; the message names the file or field, the value and the way out."""


class NotRunning(RuntimeError):  # noqa: N818 - it will be
    """The supervisor can't do that now; the message says why."""
