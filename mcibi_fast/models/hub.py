"""Saves models to folders and the Hugging Face Hub, and loads them.

A folder holds ``model.safetensors``, whose header contains the :class:`ModelSpec`; ``config.json``,
the same specification for people, for the Hub's page and for transformers;
``preprocessor_config.json``, from which transformers prepares images; and a ``README.md`` that says
how to load the model. `mcibi_fast.compat.transformers.auto` makes transformers know such folders.

The Hub's ``ModelHubMixin`` is not used: it creates the repository before the model is checked and
deletes ``config.json`` before the weights are written, and on loading it downloads and reads
``config.json`` separately, unchecked and perhaps from another commit than the weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
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

from mcibi_fast.defaults import IMAGENET_MEAN, IMAGENET_STD
from mcibi_fast.errors import WeightsError
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
PREPROCESSOR = "preprocessor_config.json"
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
    _write_json(folder / CONFIG, _config(spec))
    _write_json(folder / PREPROCESSOR, _preprocessor(model, spec))
    if not (folder / CARD).exists():
        write_text(folder / CARD, _card(spec))
    return folder


def spec_of(
    model: Segmentor,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
) -> ModelSpec:
    """The specification of a model, as it is now, for :func:`save_pretrained`.

    Args:
        model: a model that was loaded, trained, or made by :func:`mcibi_fast.models.create`.
        classes: K class names, by default those of ``model.spec``, or else "class 0", "class 1" ...
        palette: K colours (r, g, b), by default those of ``model.spec``, or else distinct ones.

    Raises:
        ValueError: the model was put together by hand; a number of classes or colours that is not
            K; an option that cannot be written to a file.
    """
    K = model.head.num_classes
    known = model.spec
    if known is not None:
        name, backbone, options = known.name, known.backbone, known.options
        classes, palette = classes or known.classes, palette or known.palette
    elif model._created is not None:
        name, backbone, options = model._created
    else:
        raise ValueError(
            "spec: this model was neither loaded nor made by models.create, so its options are not "
            "known; write it with hub.save_pretrained(model, spec, folder)"
        )
    for option, value in options.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(
                f"options: {option} is a {type(value).__name__}, which no file can hold; make the "
                "model without it to save it"
            ) from None
    if classes is None:
        classes = [f"class {k}" for k in range(K)]
    if palette is None:
        palette = colours(K)
    for what, found in (("classes", classes), ("palette", palette)):
        if len(found) != K:
            raise ValueError(f"{what}: expected {K}, one for each class, got {len(found)}")
    mean, std = model.normalisation or (IMAGENET_MEAN, IMAGENET_STD)
    return ModelSpec(
        name=name,
        backbone=backbone,
        options={option: value for option, value in options.items() if option != "pretrained"},
        classes=list(classes),
        palette=[list(colour) for colour in palette],
        mean=list(mean),
        std=list(std),
        ignore_index=model.head.ignore_index,
        mixed_precision=model.precision,
        inference=known.inference if known else None,
    )


def colours(num_classes: int) -> list[list[int]]:
    """The colours (r, g, b) of classes that have none of their own."""
    from mcibi_fast.viz import distinct_palette, voc_palette

    palette = distinct_palette if num_classes <= 1000 else voc_palette
    return palette(num_classes).tolist()


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
        WeightsError: the repository could not be fetched; the message says what to do.
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
        WeightsError: the Hub could not be reached or refused; the message says what to do.
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
            raise WeightsError(
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
                "The repository does not exist or is private or gated: check the name, log in "
                "with `hf auth login` or pass token="
            )
        elif isinstance(error, (RevisionNotFoundError, HFValidationError)):
            advice = "Check the repository's name and the revision"
        else:
            advice = (
                "Without a network, download the repository on a machine that has one "
                f"(`hf download {repo} --local-dir FOLDER`) and pass the folder"
            )
        raise WeightsError(
            f"from_pretrained: {repo} is not a folder here, and could not be fetched from the Hub "
            f"({_reason(error)}). {advice}"
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


def _config(spec: ModelSpec) -> dict[str, Any]:
    """The specification and, beside it, what transformers looks for."""
    return {
        "library_name": "mcibi_fast",
        "library_version": __version__,
        "model_type": "mcibi_fast",
        "architectures": ["MCIBIFastForSemanticSegmentation"],
        "id2label": dict(enumerate(spec.classes)),
        "label2id": {name: k for k, name in enumerate(spec.classes)},
        **asdict(spec),
    }


def _preprocessor(model: Segmentor, spec: ModelSpec) -> dict[str, Any]:
    """How transformers prepares images, and resizes the logits."""
    return {
        "image_processor_type": "MCIBIFastImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "align_corners": model.head.align_corners,
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())


def _card(spec: ModelSpec) -> str:
    return f"""---
library_name: mcibi_fast
pipeline_tag: image-segmentation
---

`{spec.name}` with backbone `{spec.backbone}` for {len(spec.classes)} classes, saved by mcibi_fast
{__version__}.

```python
import mcibi_fast

model = mcibi_fast.load("owner/name")  # or a folder with these files
labels = model.predict("photo.jpg")  # (H, W), a class index for each pixel
```
"""


Segmentor._hub = sys.modules[__name__]
