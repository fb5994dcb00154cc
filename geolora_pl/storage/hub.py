"""Adapters on the Hugging Face hub: the files of a repository, fetched and pushed by huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import huggingface_hub  # which imports its public names at their first use, and its modules not at all

from geolora_pl.errors import in_one_line
from geolora_pl.storage.peft import CONFIG, WEIGHTS

ADAPTER = "geolora_adapter.safetensors"  # the file of save_adapter
CARD = "README.md"
PICTURE = "ranks.png"
LORA_OF_DIFFUSERS = "pytorch_lora_weights.safetensors"
# Whatever one push may write. A further push removes those that it does not write, so that all are of one adapter.
_OURS = (ADAPTER, CARD, PICTURE, CONFIG, WEIGHTS, LORA_OF_DIFFUSERS)
_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt")  # of a file that is missed, though its path looks like a name
_LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


def is_repo_id(name: str) -> bool:
    """Whether a text can be the name of a repository on the hub, with its owner.

    Example:
        >>> is_repo_id("user/name"), is_repo_id("name"), is_repo_id("../name"), is_repo_id("runs/a.safetensors")
        (True, False, False, False)
    """
    return name.count("/") == 1 and not name.endswith(_ENDINGS) and is_hub_name(name)


def is_hub_name(name: str) -> bool:
    """Whether a text can be the name of a model or data set on the hub, with its owner or without.

    Example:
        >>> is_hub_name("gpt2"), is_hub_name("user/name"), is_hub_name("/home/user/name")
        (True, True, False)
    """
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return True


def is_there(name: str, kind: Literal["model", "dataset"], token: str | None) -> bool:
    """Whether the hub has a model or data set of that name, as far as the token may see it.

    Raises:
        ValueError: The hub does not say.
    """
    with _one_sentence(name, None):
        return huggingface_hub.HfApi(token=token).repo_exists(name, repo_type=kind)


def located(path: str | Path, revision: str | None = None, token: str | None = None, *, lora: bool = False) -> Path:
    """Where an adapter lies on this machine: what is at the path, or else what the hub has under that name.

    Of a repository the file of :func:`~geolora_pl.save_adapter` is fetched, or the LoRA of PEFT where there is none.
    Nothing else is: both are numbers and names, so that nothing which could run code is even fetched.

    Args:
        path: A path, or the name of a repository, ``user/name``; a path that exists goes first.
        revision: A branch, tag or commit of the repository.
        token: By default the one of ``hf auth login`` or ``HF_TOKEN``.
        lora: Whether only a LoRA of PEFT is looked for.

    Returns:
        The file, or the folder of the LoRA.

    Raises:
        ValueError: There is neither a path nor a repository of that name, the repository cannot be read, a revision is
            given for a path, or the token is none.

    Example:
        >>> located("gone.safetensors")
        Traceback (most recent call last):
        ValueError: gone.safetensors is not a file or folder (from ...), nor a repository of the hub, user/name
    """
    if not Path(path).exists():
        if is_repo_id(str(path)):
            _refuse_odd(token)
            return _fetched(str(path), revision, token, lora)
        raise ValueError(f"{path} is not a file or folder (from {Path.cwd()}), nor a repository of the hub, user/name")
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for a repository of the hub, and {path} is not one: leave it out")
    of_ours = Path(path, ADAPTER)
    return of_ours if of_ours.is_file() and not lora else Path(path)


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Push the files of a folder as one commit; a repository that is not there yet is made.

    Args:
        folder: A folder with some of the files that a repository of an adapter has, and no others.
        repo_id: The name of the repository, ``user/name``.
        private: Whether nobody else may see it; by default as the owner has it on the hub. An existing repository stays
            as it is.
        revision: The branch, which is made if it is not there; by default the main one.
        commit_message: What the commit says.
        token: By default the one of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The address of the repository.

    Raises:
        ValueError: The hub does not take it, or the repository is public and ``private`` is true; nothing has been
            uploaded then.
    """
    api = huggingface_hub.HfApi(token=token)
    with _one_sentence(repo_id, None):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo_id).private
    if is_public:
        raise ValueError(
            f"repo_id={repo_id!r} is a public repository already, and private=True was asked for: make it private on "
            "the hub, or choose another name"
        )
    with _one_sentence(repo_id, revision):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        made = sorted(file.name for file in folder.iterdir())
        operations: list[Any] = [huggingface_hub.CommitOperationAdd(name, folder / name) for name in made]
        gone = sorted(there.intersection(_OURS).difference(made))
        operations += [huggingface_hub.CommitOperationDelete(name) for name in gone]
        message = commit_message or "Push an adapter of geolora_pl"
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(url)


def refuse_what_cannot_be_pushed(repo_id: str, token: str | None) -> None:
    """Refuse a name that the hub does not take, and a missing token, before the work that would be in vain.

    Raises:
        ValueError: The name is not ``user/name``, or there is no token, or what is given is none.
    """
    _refuse_odd(token)
    if not is_repo_id(repo_id):
        raise ValueError(
            f"repo_id={repo_id!r} cannot be the name of a repository: write user/name, of letters, digits, '-', '_' "
            "and '.'"
        )
    if token is None and huggingface_hub.get_token() is None:
        raise ValueError(f"repo_id={repo_id!r} cannot be pushed to without a token of the hub: {_LOG_IN}")


def _refuse_odd(token: str | None) -> None:
    """Refuse what cannot be a token, and not show it: the client would print it with the header that it cannot send."""
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            "token=... holds a space, the end of a line or another character that no token has: if it was read from a "
            "file, pass token.strip()"
        )


def _fetched(repo_id: str, revision: str | None, token: str | None, lora: bool) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    fetch = partial(huggingface_hub.hf_hub_download, repo_id, token=token)
    with _one_sentence(repo_id, revision):
        unreachable = False
        try:
            if not lora:
                return Path(fetch(ADAPTER, revision=revision))
        except EntryNotFoundError as error:
            unreachable = isinstance(error, LocalEntryNotFoundError)
        folder = Path(fetch(CONFIG, revision=revision, local_files_only=unreachable)).parent
        # Of the same commit, which is the name of the folder in the cache.
        fetch(WEIGHTS, revision=folder.name, local_files_only=unreachable)
    return folder


@contextmanager
def _one_sentence(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence why the hub gave an error, whatever library below huggingface_hub it comes from."""
    try:
        yield
    except Exception as error:
        raise ValueError(_sentence(error, repo_id, revision)) from error


def _sentence(error: Exception, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its terms on the hub, and {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id} is no repository of the hub that you may see (and no path from {Path.cwd()}): correct the "
            f"name, or {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision={revision!r}: name a branch, a tag or a commit of it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{repo_id} is not a path here (from {Path.cwd()}), the hub cannot be reached (or HF_HUB_OFFLINE is set), "
            "and the cache does not hold it: correct the path, or connect and try again"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo_id} has no {ADAPTER}, nor {CONFIG} with {WEIGHTS}: name the repository of an adapter"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses {repo_id} ({status}): {_LOG_IN}, with a token that may write to it"
    return f"{repo_id}: the hub cannot do this ({in_one_line(error)[:300]}): look at the connection, and try again"
