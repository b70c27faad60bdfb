"""Distances between two sets of features: Frechet's, and the kernel distance. All in float64."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..hub.files import printable, written_whole
from ..models.weights import mapped_weights, metadata_of, save_weights


_NUM_IMAGES = "num_images"


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features.

    Args:
        mean (`Tensor`): `[F]` float64.
        root (`Tensor`): `[K, F]` float64, of which `root.T @ root` is the covariance.
        num_images (`int`): Of how many images.
    """

    mean: Tensor
    root: Tensor
    num_images: int

    @classmethod
    def of_features(cls, features: Tensor) -> "FeatureStatistics":
        """Of features, `[N, F]`, with the unbiased covariance.

        Raises:
            ValueError: If there are fewer than two.
        """
        if len(features) < 2:
            raise ValueError(
                f"A distance between distributions needs two images at least, but has {len(features)}: raise "
                "--num_validation_images, or give more prompts."
            )
        features = features.double()
        mean = features.mean(0)
        centred = (features - mean) / (len(features) - 1) ** 0.5
        many = len(features) > features.shape[1]
        return cls(mean, torch.linalg.qr(centred, mode="r").R if many else centred, len(features))

    def save(self, file: str | Path, metadata: dict[str, str]) -> None:
        """Writes `mean` [F] and `covariance` [F, F] into a `.safetensors` file.

        Args:
            file (`str` or `Path`): To write.
            metadata (`dict[str, str]`): Of the network that the features are of: `FeatureNetwork.metadata`.
        """
        tensors = {"mean": self.mean.contiguous(), "covariance": (self.root.T @ self.root).contiguous()}
        with written_whole(Path(file)) as draft:
            save_weights(tensors, draft, {**metadata, _NUM_IMAGES: str(self.num_images)})

    @classmethod
    def read(cls, file: str | Path, metadata: dict[str, str]) -> "FeatureStatistics":
        """Reads what `save` wrote.

        Args:
            file (`str` or `Path`): A `.safetensors` file.
            metadata (`dict[str, str]`): Of the network whose features it is compared with.

        Raises:
            ValueError: If it is no such file, its numbers make no sense, or it is of another network.
        """
        said = metadata_of(file)
        if lacking := sorted({*metadata, _NUM_IMAGES} - said.keys()):
            raise ValueError(f"{file} is no file of feature statistics: its metadata lack {', '.join(lacking)}.")
        other = [key for key in metadata if key != "feature_model" and said[key] != metadata[key]]
        if other:
            raise ValueError(
                f"{file} is of features of {printable(said['feature_model'])}, and not of {metadata['feature_model']} as it "
                f"is here: the {' and the '.join(other)} differ. Pass the same feature_model, or write it anew."
            )
        tensors = mapped_weights(file)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        size = tensors["mean"].numel() if "mean" in tensors else 0
        if shapes != {"mean": [size], "covariance": [size, size]} or size == 0:
            raise ValueError(f"{file} has to hold mean [F] and covariance [F, F], but holds {shapes}.")
        mean, covariance = (tensors[name].clone() for name in ("mean", "covariance"))
        if {mean.dtype, covariance.dtype} != {torch.float64}:
            raise ValueError(f"{file} has to hold float64 numbers, but holds {mean.dtype} and {covariance.dtype}.")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{file} holds numbers that are NaN or infinite.")
        values, vectors = torch.linalg.eigh(covariance)
        tolerance = 1e-8 * max(values.abs().max().item(), 1e-300)
        if (covariance - covariance.T).abs().max() > tolerance or values.min() < -tolerance:
            raise ValueError(
                f"{file} holds a covariance that is none: it is not symmetric, or has negative variances."
            )
        count = said[_NUM_IMAGES]
        if not re.fullmatch("[0-9]{1,15}", count) or int(count) < 2:
            raise ValueError(f"{file} says that it is of {count[:20]!r} images.")
        return cls(mean, values.clamp_min(0).sqrt()[:, None] * vectors.T, int(count))


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the squared Frechet distance of two Gaussians (arXiv 1706.08500, Eq. 6).

    The trace of the root is the sum of the singular values of R1 R2^T, where C = R^T R. torchmetrics takes the roots of the
    eigenvalues of C1 C2 in its place, which is slower, and less exact where there are fewer images than features: most of
    these eigenvalues are zero but for rounding, and their roots are not.
    """
    cross = torch.linalg.svdvals(one.root @ other.root.T).sum()
    traces = one.root.square().sum() + other.root.square().sum()
    return ((one.mean - other.mean).square().sum() + traces - 2 * cross).item()


def kernel_sum(one: Tensor, other: Tensor) -> float:
    """The sum of k(x, y) = (x . y / F + 1)^3 over all pairs of two sets of features, `[N, F]` and `[M, F]` float64."""
    return sum((part @ other.T / other.shape[1] + 1).pow(3).sum().item() for part in one.split(1000))


def own_kernel_mean(features: Tensor) -> float:
    """The mean of k(x, x') over all pairs of different features, `[N, F]` float64, N >= 2."""
    count = len(features)
    diagonal = (features.square().sum(1) / features.shape[1] + 1).pow(3).sum().item()
    return (kernel_sum(features, features) - diagonal) / (count * (count - 1))


def kernel_distance(features: Tensor, reference: Tensor, reference_mean: float | None = None) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy (KID, arXiv 1801.01401, Sec. 4: with the cubic kernel of
    `kernel_sum`). It is below 0 as often as above between sets of one distribution.

    Args:
        features, reference (`Tensor`): `[N, F]` and `[M, F]` float64, N and M >= 2.
        reference_mean (`float`, *optional*): The reference's `own_kernel_mean`, if it is known.
    """
    within = own_kernel_mean(reference) if reference_mean is None else reference_mean
    between = kernel_sum(features, reference) / (len(features) * len(reference))
    return own_kernel_mean(features) + within - 2 * between
