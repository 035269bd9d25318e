"""MCIBI++'s memory in Hugging Face's segmentation models."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import Tensor, nn

from mcibi_fast.compat.dataset_context import ContextClassifier, insert, is_a, unknown
from mcibi_fast.nn import swapping

# Model class: its classifier, and the dropout before it.
PLACES: dict[str, tuple[str, str | None]] = {
    "SegformerForSemanticSegmentation": ("decode_head.classifier", "decode_head.dropout"),
    "UperNetForSemanticSegmentation": ("decode_head.classifier", None),
    "BeitForSemanticSegmentation": ("decode_head.classifier", None),
    "Data2VecVisionForSemanticSegmentation": ("decode_head.classifier", None),
    "DPTForSemanticSegmentation": ("head.head.4", None),
    "MobileViTForSemanticSegmentation": (
        "segmentation_head.classifier.convolution",
        "segmentation_head.dropout",
    ),
}


def with_mcibi(model: nn.Module, **options: Any) -> nn.Module:
    """Puts a dataset-level context in front of a model's classifier, in place.

    ``model(pixel_values=..., labels=...)`` then has the loss of W in its ``loss``, and each step of
    the optimiser updates the memory, also with the library's ``Trainer``. In evaluation mode
    ``logits`` are those of the last stage. Without labels, add ``model.mcibi_loss(labels)`` to a
    loss of your own. The model's class becomes a subclass of its own with the same ``forward``;
    ``save_pretrained`` saves the options with the configuration, and :func:`from_pretrained` loads
    the result. An auxiliary head stays as it is.

    Args:
        model: a model of one of the classes in ``PLACES``, for two classes or more.
        options: of :class:`mcibi_fast.compat.dataset_context.ContextClassifier`. Here ``pool`` is 2
            by default (1 for MobileViT), as features have stride 4, and ``ignore_index`` is
            ``config.semantic_loss_ignore_index``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError, ValueError: the model is not known or has a context already; a wrong option.
    """
    if not isinstance(model, nn.Module) or _place(type(model)) is None:
        raise unknown(model, "transformers", ", ".join(PLACES))
    config: Any = model.config
    _attach(model, options)
    config.mcibi = options
    swapping.swap(model, _WithContext)
    return model


def from_pretrained(path: str, **options: Any) -> nn.Module:
    """Loads what ``save_pretrained`` of a model with a memory has saved.

    Args:
        path: a folder, or a name on the Hugging Face Hub.
        options: of ``from_pretrained`` of transformers.

    Raises:
        ValueError: what was saved has no memory.
    """
    transformers = importlib.import_module("transformers")
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(
        path, **{k: v for k, v in options.items() if k in ("revision", "token", "cache_dir")}
    )
    if getattr(config, "mcibi", None) is None:
        raise ValueError(
            f"from_pretrained: the configuration of {path} has no memory; load it with "
            "transformers and give the model to with_mcibi"
        )
    cls = getattr(transformers, config.architectures[0].removesuffix(_WithContext.suffix))
    cls = swapping.subclass(_WithContext, cls, _WithContext.methods)
    return cls.from_pretrained(path, config=config, **options)


def _place(cls: type) -> tuple[str, str | None] | None:
    return next((PLACES[c.__name__] for c in cls.__mro__ if c.__name__ in PLACES), None)


def _attach(model: Any, options: dict[str, Any]) -> None:
    place = _place(type(model))
    assert place is not None
    options = {
        "pool": 1 if is_a(model, "MobileViTForSemanticSegmentation") else 2,
        "ignore_index": getattr(model.config, "semantic_loss_ignore_index", 255),
    } | options
    model.mcibi_loss = insert(model, place[0], options, dropout=place[1]).loss


class _WithContext(swapping.Swapped):
    """The new method of a model with a context, which ``from_pretrained`` also makes anew."""

    suffix = "WithMCIBI"
    mcibi_place: str  # the classifier
    mcibi_labels: int  # position of the labels among the arguments

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        place, held = _place(cls), inspect.signature(cls.forward).parameters
        assert place is not None
        cls.mcibi_place, cls.mcibi_labels = place[0], list(held).index("labels") - 1

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _attach(self, config.mcibi)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        at = self.mcibi_labels
        labels = args[at] if len(args) > at else kwargs.get("labels")
        head: ContextClassifier = self.get_submodule(self.mcibi_place)
        head.keeps = labels is not None
        try:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            head.keeps = False
        return output if labels is None else _add(output, head.loss(labels))


def _add(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return output[0] + loss, *output[1:]
    output.loss = output.loss + loss
    return output
