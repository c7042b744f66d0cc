"""Where MODEL lies: a directory of this machine, or a commit of a repository of the Hub. Nothing is read here."""

import re
from pathlib import Path

from cluster.errors import ModelError
from cluster.models.family import example_ids

DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "tokenizer*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Where huggingface_hub keeps a commit of a repository. Names there have no double dashes of their own.
SNAPSHOT = re.compile(r".*/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")


def resolve_model(model: str, known: str = "") -> Path:
    """The directory of MODEL: itself, or where the Hub's copy lies after a download. Raises ModelError.

    `known` is where actors that live have it from: of a model of the Hub they go on with that commit, whatever the Hub
    has by now.
    """
    if is_commit_of(model, known):
        return Path(known)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"model={model!r} is a file: give the directory that holds config.json and the weights")
    if not HUB_ID.fullmatch(model):
        raise ModelError(
            f"model={model!r} is no directory, and no Hub id (owner/name): give a directory in Hugging Face layout, "
            f"a Hub id such as {example_ids()}, or `demo`"
        )
    return _download(model)


def is_commit_of(model: str, path: str) -> bool:
    """Whether the directory holds a commit of the repository `model` of the Hub."""
    found = SNAPSHOT.fullmatch(path)
    return found is not None and model == f"{found['owner']}/{found['name']}" and not Path(model).is_dir()


def local_copy(path: str) -> Path:
    """A checkpoint's directory on this machine. A commit of the Hub that another machine has downloaded is downloaded
    here as well. Raises ModelError.
    """
    found = SNAPSHOT.fullmatch(path)
    if Path(path).is_dir() or found is None:
        return Path(path)
    return _download(f"{found['owner']}/{found['name']}", found["commit"])


def _download(hub_id: str, commit: str | None = None) -> Path:
    # Imported late: a local directory must work without network libraries being touched.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=list(DOWNLOADED)))
    except GatedRepoError:
        raise ModelError(f"model={hub_id!r} is gated: accept its terms on huggingface.co and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model={hub_id!r} is neither a directory here nor a model on the Hub that you may read: "
            "check the spelling, or set HF_TOKEN for a private one"
        ) from None
    except Exception as error:
        raise ModelError(
            f"model={hub_id!r} is no directory here and can't be fetched from the Hub "
            f"({type(error).__name__}: {error}): check the network, or download it elsewhere and give its directory"
        ) from None
