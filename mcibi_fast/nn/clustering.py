"""Initialisation by clustering: composite vectors of each class's pixel representations.

The paper (section 4.2) initialises the memory with the statistics of "the composite vector of each
category, ... obtained by cosine similarity clustering"; MCIBI (arXiv 2108.11819) stores the vectors
themselves. Neither paper says more about the clustering. Here it is k-means of the pixels'
directions (spherical k-means).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast import extras
from mcibi_fast.defaults import IGNORE_INDEX
from mcibi_fast.nn.bilinear import pixels
from mcibi_fast.ops import checks


class PixelSample:
    """Some pixel representations of every class, drawn at random, in float32 on the CPU.

    Args:
        num_classes: K.
        channels: Z.
        per_class: how many pixels of each class are kept: at most K x per_class x Z numbers in all.
        per_batch: how many pixels of one class are drawn from one batch; a small number makes them
            come from many images.
        seed: seed of the draws.
        ignore_index: label that belongs to no class.
        align_corners: whether features are upsampled to the labels' size with aligned corners.

    Attributes:
        counts: how many pixels of each class are kept so far.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        per_class: int = 512,
        per_batch: int = 32,
        seed: int = 0,
        ignore_index: int = IGNORE_INDEX,
        align_corners: bool = False,
    ) -> None:
        checks.ignore_index(ignore_index, num_classes)
        self.channels = channels
        self.per_class = per_class
        self.per_batch = per_batch
        self.seed = seed
        self.ignore_index = ignore_index
        self.align_corners = align_corners
        self.counts = [0] * num_classes
        self._generator = torch.Generator().manual_seed(seed)
        self._vectors: list[list[Tensor]] = [[] for _ in range(num_classes)]

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Draws pixels of R (B, Z, h, w) with labels (B, H, W) for classes that still need some."""
        features = features.float()
        labels = labels.long()  # their own dtype may be too small for k or ignore_index
        for k, count in enumerate(self.counts):
            wanted = min(self.per_class - count, self.per_batch)
            if wanted == 0 or k == self.ignore_index:
                continue
            positions = (labels == k).flatten().nonzero().flatten()
            if len(positions) > wanted:
                picks = torch.randint(len(positions), (wanted,), generator=self._generator)
                positions = positions[picks.to(positions.device)]
            if len(positions):
                found = pixels(features, labels, positions, self.align_corners)
                found = found[found.isfinite().all(1)]
                self._vectors[k].append(found.cpu())
                self.counts[k] += len(found)

    def centres(self, clusters: int) -> Tensor:
        """Each class's cluster centres (K, clusters, Z), the largest cluster first.

        Rows are zero if a class's pixels give fewer clusters.
        """
        result = torch.zeros(len(self.counts), clusters, self.channels)
        for k, vectors in enumerate(self._vectors):
            if vectors:
                found = spherical_centres(torch.cat(vectors), clusters, seed=self.seed)
                result[k, : len(found)] = found
        return result


def spherical_centres(vectors: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Centres of clusters by cosine similarity: the mean direction with the mean length.

    Args:
        vectors: (M, Z).
        clusters: how many; fewer are returned if there are fewer different directions.
        seed: seed of scikit-learn's k-means.

    Returns:
        (at most clusters, Z), the largest cluster first, in the dtype of the vectors.
    """
    exact = vectors.double()
    directions, lengths = F.normalize(exact, dim=1), exact.norm(dim=1)
    clusters = min(clusters, len(directions.unique(dim=0)))
    members = torch.zeros(len(vectors), dtype=torch.int64)  # a single cluster holds all vectors
    if clusters > 1:
        # On unit vectors |a - b|^2 = 2 - 2 cos(a, b).
        cluster = extras.load("mcibi_fast.nn.clustering", "sklearn.cluster")
        kmeans = cluster.KMeans(clusters, n_init=4, random_state=seed)
        members = torch.from_numpy(kmeans.fit_predict(directions.numpy())).long()
    sizes = members.bincount(minlength=clusters)
    centres = [
        F.normalize(directions[members == c].mean(0), dim=0) * lengths[members == c].mean()
        for c in sizes.argsort(descending=True, stable=True).tolist()
    ]
    return torch.stack(centres).to(vectors.dtype)
