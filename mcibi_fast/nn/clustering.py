"""Initialisation by clustering: composite vectors of each class's pixel representations.

The paper (section 4.2) initialises the memory with the statistics of "the composite vector of each
category, ... obtained by cosine similarity clustering", as MCIBI (arXiv 2108.11819) does with the
vectors themselves. Neither says more. Here: k-means of the pixels' directions (spherical k-means).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcibi_fast import extras
from mcibi_fast.nn.bilinear import pixels


class PixelSample:
    """Some pixel representations of every class, drawn at random, in float32 on the CPU.

    Args:
        num_classes: K.
        channels: Z.
        per_class: pixels held of each class: at most K x per_class x Z numbers in all.
        per_batch: pixels of one class drawn from one batch, so that they come from many images.
        seed: of the draws.
        ignore_index: label that belongs to no class.
        align_corners: of the bilinear upsampling of the features to the labels' size.

    Attributes:
        counts: pixels held of each class.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        per_class: int = 512,
        per_batch: int = 32,
        seed: int = 0,
        ignore_index: int = 255,
        align_corners: bool = False,
    ) -> None:
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
        """Draws from R (B, Z, h, w) and its labels (B, H, W) for the classes that lack pixels."""
        features = features.float()
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
                self._vectors[k].append(found.cpu())
                self.counts[k] += len(found)

    def centres(self, clusters: int) -> Tensor:
        """(K, clusters, Z): those of each class by size, zero where its pixels give no more."""
        result = torch.zeros(len(self.counts), clusters, self.channels)
        for k, vectors in enumerate(self._vectors):
            if vectors:
                found = spherical_centres(torch.cat(vectors), clusters, seed=self.seed)
                result[k, : len(found)] = found
        return result


def spherical_centres(vectors: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Centres of clusters by cosine similarity: the mean direction, at the mean length.

    Args:
        vectors: (M, Z).
        clusters: how many; fewer where there are fewer directions.
        seed: of scikit-learn's k-means.

    Returns:
        (at most clusters, Z), the largest cluster first, in the dtype of the vectors.
    """
    exact = vectors.double()
    directions, lengths = F.normalize(exact, dim=1), exact.norm(dim=1)
    clusters = min(clusters, len(directions.unique(dim=0)))
    members = torch.zeros(len(vectors), dtype=torch.int64)  # of one cluster: all
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
