"""Accelerates Hugging Face's models for semantic segmentation, and their image processors.

    model = SegformerForSemanticSegmentation.from_pretrained(...)
    compat.transformers.accelerate(model)
    compat.transformers.accelerate(image_processor)

A model (every class ``...ForSemanticSegmentation``: Segformer, UperNet, DPT, BEiT, Data2VecVision,
MobileViT, MobileViTV2, ...) computes ``loss`` as Hugging Face does, auxiliary heads included, but
without the upsampled logits. UperNet's and Data2Vec's conventions stay theirs: UperNet returns
``logits`` at the size of the image, as a stand-in that is computed only if something reads it
(:class:`mcibi_fast.compat.upsampled.Upsampled`). An image processor's
``post_process_semantic_segmentation`` finds the classes without the resized logits, those of
Mask2Former and MaskFormer too.

``with_mcibi`` gives such a model the dataset-level context of MCIBI++
(:mod:`mcibi_fast.compat.dataset_context`).
"""

from mcibi_fast.compat.dataset_context import context_of
from mcibi_fast.compat.transformers.memory import from_pretrained, with_mcibi
from mcibi_fast.compat.transformers.places import accelerate, explain, restore

__all__ = ["accelerate", "context_of", "explain", "from_pretrained", "restore", "with_mcibi"]
