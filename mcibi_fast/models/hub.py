"""Saves models to folders and the Hugging Face Hub, and loads them.

A folder holds ``model.safetensors``, whose header contains the :class:`ModelSpec`; ``config.json``,
the same specification for people and for the Hub's page; and a ``README.md`` that says how to load
the model.

The Hub's ``ModelHubMixin`` is not used: it creates the repository before the model is checked and
deletes ``config.json`` before the weights are written, and on loading it downloads and reads
``config.json`` separately, unchecked and perhaps from another commit than the weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mcibi_fast.files import write_atomically, write_text
from mcibi_fast.models.checkpoint import create_model, load_model
from mcibi_fast.models.segmentor import Segmentor
from mcibi_fast.models.weights import (
    LATER_ENTRIES,
    WEIGHTS,
    ModelSpec,
    find_weights,
    pack_weights,
    read_spec,
)
from mcibi_fast.untrusted import read_json
from mcibi_fast.version import __version__

CONFIG = "config.json"
CARD = "README.md"


def save_pretrained(model: Segmentor, spec: ModelSpec, folder: str | os.PathLike[str]) -> Path:
    """Writes a model into a folder, which is created if needed; a ``README.md`` there is kept.

    Args:
        model: the model that ``spec`` describes; it must not be folded.
        spec: the specification from which :func:`from_pretrained` will rebuild the model.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not the one that ``spec`` describes, or a weight is not finite.
        OSError: the folder cannot be written.
    """
    _check_spec(model, spec)
    weights = pack_weights(model, spec)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, weights)
    config = {"library_name": "mcibi_fast", "library_version": __version__, **asdict(spec)}
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    if not (folder / CARD).exists():
        write_text(folder / CARD, _card(spec))
    return folder


def from_pretrained(
    repo_or_folder: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Segmentor, ModelSpec]:
    """A saved model in evaluation mode on the CPU, and its specification.

    Args:
        repo_or_folder: an existing folder, or "owner/name" on the Hub. Files that were downloaded
            before are found in the cache without a network.
        revision: branch, tag or commit on the Hub; its main branch by default.
        token: access token for private repositories; by default that of ``hf auth login``.
        cache_dir: folder for downloads; the Hub's default cache if not given.

    Raises:
        FileNotFoundError: the folder does not exist, or there are no weights in it.
        RuntimeError: the repository could not be fetched; the message says what to do.
        ValueError: these are not weights of this package, ``config.json`` contradicts them, or a
            revision was given for a folder.
    """
    if Path(repo_or_folder).exists():
        if revision is not None:
            raise ValueError(
                f"revision: {repo_or_folder} is a local folder, which has no revisions"
            )
        folder = Path(repo_or_folder)
    elif isinstance(repo_or_folder, str) and _is_repository(repo_or_folder):
        folder = _download(repo_or_folder, revision=revision, token=token, cache_dir=cache_dir)
    else:
        raise FileNotFoundError(
            f"from_pretrained: {repo_or_folder} is neither an existing folder nor an owner/name on "
            "the Hub"
        )
    weights = find_weights(folder)
    _check_config(weights)
    return load_model(weights)


def push_to_hub(
    model: Segmentor,
    spec: ModelSpec,
    repo: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Uploads a model to the Hub's repository ``repo``, which is created if needed.

    Args:
        model, spec: see :func:`save_pretrained`.
        repo: "owner/name". A ``README.md`` there is kept.
        private: whether a newly created repository is private; its owner's setting by default.
        token: access token with the right to write; by default that of ``hf auth login``.
        commit_message: message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as in :func:`save_pretrained`, or ``repo`` is not of the form "owner/name".
        RuntimeError: the Hub could not be reached or refused; the message says what to do.
    """
    if not _is_repository(repo):
        raise ValueError(f"repo: expected owner/name, got {repo!r}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, spec, temporary)
        api = HfApi(token=token)
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            keep = [CARD] if api.file_exists(repo, CARD) else None
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                ignore_patterns=keep,
                commit_message=commit_message,
            )
        except Exception as error:  # the hub and the network raise errors of many kinds
            raise RuntimeError(
                f"push_to_hub: could not upload to {repo} ({_reason(error)}). Log in with `hf auth "
                "login` or pass token=, with the right to write there; without a network, use "
                f"save_pretrained and upload the folder later with `hf upload {repo} FOLDER`"
            ) from error
    return str(commit.commit_url)


def _is_repository(name: str) -> bool:
    owner, _, rest = name.partition("/")
    return owner not in ("", ".", "..", "~") and rest != "" and "/" not in rest


def _download(repo: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(repo, allow_patterns=[WEIGHTS, CONFIG], **options))
    except Exception as error:  # the hub and the network raise errors of many kinds
        if isinstance(error, RepositoryNotFoundError):
            advice = (
                "There is no such folder, and the repository does not exist or is private or "
                "gated: log in with `hf auth login` or pass token="
            )
        elif isinstance(error, (RevisionNotFoundError, HFValidationError)):
            advice = "Check the repository's name and the revision"
        else:
            advice = (
                "Without a network, download the repository on a machine that has one "
                f"(`hf download {repo} --local-dir FOLDER`) and pass the folder"
            )
        raise RuntimeError(
            f"from_pretrained: could not fetch {repo} ({_reason(error)}). {advice}"
        ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_spec(model: Segmentor, spec: ModelSpec) -> None:
    """Raises unless the specification rebuilds the model; else that would show only on loading."""
    with torch.random.fork_rng(devices=[]):  # saving must not change what a run draws next
        rebuilt = create_model(spec, pretrained=False).state_dict()
    own = model.state_dict()
    for name in sorted(own.keys() ^ rebuilt.keys()):
        where = "only in the model" if name in own else "missing in the model"
        raise ValueError(
            f"spec: it describes another model ({name} is {where}); folded models cannot be saved: "
            "save the model that fold() was called on"
        )
    for name, value in own.items():
        if value.shape != rebuilt[name].shape:
            raise ValueError(
                f"spec: it describes another model ({name} is {tuple(value.shape)} in the model, "
                f"{tuple(rebuilt[name].shape)} by the specification)"
            )


def _check_config(weights: Path) -> None:
    """Raises if ``config.json`` was edited: only the weights file's header is read on loading."""
    file = weights.parent / CONFIG
    if not file.is_file():
        return
    config = read_json(file)
    if isinstance(config, dict):
        config = LATER_ENTRIES | config
    for name, value in asdict(read_spec(weights)).items():
        if not isinstance(config, dict) or config.get(name) != value:
            raise ValueError(
                f"{file}: {name!r} differs from what {weights.name} was saved with; delete the "
                "file, or save the model again with the specification that you want"
            )


def _card(spec: ModelSpec) -> str:
    return f"""---
library_name: mcibi_fast
pipeline_tag: image-segmentation
---

`{spec.name}` with backbone `{spec.backbone}` for {len(spec.classes)} classes, saved by mcibi_fast
{__version__}.

```python
from mcibi_fast.models import hub

model, spec = hub.from_pretrained("owner/name")  # or a folder with these files
```
"""
