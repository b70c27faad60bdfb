"""Measures of all images together, in the features of a network: how far they are from others, and from each other."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..hub.files import inside
from .base import FeatureEvaluator, Metric
from .feature_distance import FeatureStatistics, frechet_distance, kernel_distance, own_kernel_mean
from .networks import FeatureNetwork, FeatureNetworks


FEATURE_MODEL = "facebook/dinov2-base"
"""Whose features are compared by default: DINOv2 (arXiv 2304.07193), which arXiv 2306.04675 recommends for measures of generative
models in place of Inception. Apache-2.0."""

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class _InFeatures(FeatureEvaluator):
    """An evaluator of one metric, in the features of a network.

    Args:
        feature_model (`str`): The network: see `FeatureNetwork`.
        networks (`FeatureNetworks`, *optional*): Where it is loaded, once for all who use it; by default for the CPU.

    Attributes:
        name, title, panel, direction (`str`): Of the metric, whose label says the network, too; see `Metric`.
    """

    name: str
    title: str
    panel: str
    direction: Literal["higher", "lower"] = "lower"

    def __init__(self, feature_model: str = FEATURE_MODEL, networks: FeatureNetworks | None = None):
        self.network: FeatureNetwork = (networks or FeatureNetworks()).load(feature_model)
        self.metrics = self._metrics(self.title)

    def _metrics(self, title: str) -> dict[str, Metric]:
        return {self.name: Metric(f"{title} ({self.network.label})", self.panel, self.direction)}

    def features(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """The network's, of whole images, `[N, F]`; prompts are not looked at."""
        return self.network.image_features(images)


class _ToTeacher(_InFeatures):
    """A distance to the teacher's images of `prepare`."""

    compares_with_teacher = True
    compares_distributions = True

    @abstractmethod
    def compare_with(self, features: Tensor) -> None:
        """Takes the features of the teacher's images, `[N, F]`.

        Raises:
            ValueError: If there are fewer than two.
        """


class FrechetToTeacher(_ToTeacher):
    """The Frechet distance (FID, arXiv 1706.08500, Eq. 6, in features of another network) to the teacher's images of the same
    prompts.

    Args:
        feature_model, networks: The network; by default DINOv2.
    """

    name, title, panel = "fid_to_teacher", "FID to the teacher", "fid"

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """`{"fid_to_teacher": ...}`; groups are not looked at.

        Raises:
            ValueError: If there are fewer than two images.
        """
        return {self.name: frechet_distance(FeatureStatistics.of_features(features), self.reference)}

    def compare_with(self, features: Tensor) -> None:
        """Takes the mean and the covariance of the features of the teacher's images."""
        self.reference = FeatureStatistics.of_features(features)


class PatchFrechetToTeacher(FrechetToTeacher):
    """The same between patches of the images at full resolution, as in SDXL-Lightning (arXiv 2402.13929) and DMD2 (arXiv
    2405.14867): it sees texture that resizing hides. A patch is the middle of the image, as large as the network takes it;
    see `ImagePreprocessing.patch` for images that are not larger than that.

    Args:
        feature_model, networks: The network; by default DINOv2.
    """

    name, title, panel = "patch_fid_to_teacher", "patch FID to the teacher", "patch_fid"

    def features(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """The network's, of the middle of images, `[N, F]`; prompts are not looked at."""
        return self.network.patch_features(images)


class KernelToTeacher(_ToTeacher):
    """The kernel distance (KID, arXiv 1801.01401, in features of another network) to the teacher's images of the same prompts:
    unlike the Frechet distance its expectation does not depend on the number of images.

    Args:
        feature_model, networks: The network; by default DINOv2.
    """

    name, title, panel = "kid_to_teacher", "KID to the teacher", "kid"

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """`{"kid_to_teacher": ...}`; groups are not looked at.

        Raises:
            ValueError: If there are fewer than two images.
        """
        _check_two(features)
        return {"kid_to_teacher": kernel_distance(features.double(), self.reference, self.reference_mean)}

    def compare_with(self, features: Tensor) -> None:
        """Takes the features of the teacher's images."""
        _check_two(features)
        self.reference = features.double()
        self.reference_mean = own_kernel_mean(self.reference)


class FrechetToImages(FrechetToTeacher):
    """The Frechet distance to real images.

    Args:
        reference_images (`str`): A folder of images, of which those in folders inside count, too; or a file of statistics that
            `write_reference_statistics` wrote, of the same network.
        feature_model, networks: The network; by default DINOv2.

    Attributes:
        reference (`FeatureStatistics`): Also says of how many images.

    Raises:
        ValueError: If there are fewer than two images, one cannot be read or lies elsewhere, or the statistics are of another
            network.
    """

    name = "fid"
    compares_with_teacher = False
    compares_distributions = False

    def __init__(
        self, reference_images: str, feature_model: str = FEATURE_MODEL, networks: FeatureNetworks | None = None
    ):
        super().__init__(feature_model, networks)
        self.reference = reference_statistics(reference_images, self.network)
        self.metrics = self._metrics(f"FID to {self.reference.num_images} real images")


class Diversity(_InFeatures):
    """1 - cosine of the features of two images of one prompt, averaged over the prompt's pairs, and over the prompts with two
    images or more. 0 if a prompt is always drawn alike.

    Args:
        feature_model, networks: The network; by default DINOv2.
    """

    name = title = panel = "diversity"
    direction = "higher"

    def prepare(self, teacher_images: Tensor, prompts: Sequence[str]) -> None:
        """Sees that there are prompts with two images.

        Raises:
            ValueError: If there are none.
        """
        if len(set(prompts)) == len(prompts):
            raise ValueError(
                "diversity compares images of one prompt, but no prompt has two: raise --num_validation_images to 2 or more."
            )

    def features(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """The network's, `[N, F]`; prompts are not looked at."""
        return self.network.image_features(images)

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """`{"diversity": ...}`.

        Raises:
            ValueError: If no prompt has two images.
        """
        return {"diversity": cosine_diversity(features, groups)}


def cosine_diversity(features: Tensor, groups: Tensor) -> float:
    """1 - cosine of the features of two images of one group, averaged over the group's pairs, and over the groups of two images
    or more. 0 if the images of each group are alike.

    Args:
        features (`Tensor`): `[N, F]`.
        groups (`Tensor`): Which images are of one group: equal numbers, `[N]` int64.

    Raises:
        ValueError: If no group has two images.
    """
    features = normalize(features.double(), dim=1)
    _, rows, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), features.shape[1], dtype=torch.float64).index_add_(0, rows, features)
    several = counts > 1
    if not several.any():
        raise ValueError("No prompt has two images: their diversity is not defined.")
    squares = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, rows, features.square().sum(1))
    # The sum over pairs i != j of x_i . x_j is |sum of x|^2 less the sum of |x|^2.
    cosines = (sums.square().sum(1) - squares)[several] / (counts * (counts - 1))[several]
    return (1 - cosines).mean().item()


def reference_statistics(reference_images: str | Path, network: FeatureNetwork) -> FeatureStatistics:
    """Statistics of real images: of a folder of images, or as a `.safetensors` file holds them.

    Raises:
        ValueError: As of `FrechetToImages`.
    """
    place = Path(reference_images)
    if place.is_dir():
        return FeatureStatistics.of_features(network.features_of_files(_image_files(place)))
    if place.suffix != ".safetensors" or not place.is_file():
        raise ValueError(
            f"reference_images {str(reference_images)!r} is no folder of images, and no .safetensors file of statistics."
        )
    statistics = FeatureStatistics.read(place, network.metadata())
    if len(statistics.mean) != network.num_features:
        raise ValueError(f"{place} is of {len(statistics.mean)} features; {network.what} has {network.num_features}.")
    return statistics


def write_reference_statistics(
    images: str | Path,
    file: str | Path,
    feature_model: str = FEATURE_MODEL,
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
) -> FeatureStatistics:
    """Writes the statistics of a folder of images, for `fid`: `mean` [F] and `covariance` [F, F] in float64, the number of images,
    and which network's features they are of.

    Args:
        images (`str` or `Path`): A folder of images.
        file (`str` or `Path`): `.safetensors`, to write.
        feature_model, device, cache_dir: As of `FeatureNetwork`.

    Raises:
        ValueError: If there are fewer than two images, or one cannot be read or lies elsewhere.
    """
    if Path(file).suffix != ".safetensors":
        raise ValueError(f"Statistics are written as a .safetensors file, but {str(file)!r} is none.")
    network = FeatureNetwork(feature_model, device=device, cache_dir=cache_dir)
    statistics = FeatureStatistics.of_features(network.features_of_files(_image_files(Path(images))))
    statistics.save(file, network.metadata())
    return statistics


def _image_files(folder: Path) -> list[Path]:
    """The images in a folder and in those inside, sorted by name.

    Raises:
        ValueError: If there are fewer than two, or one is a link that leads out.
    """
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix.lower() in _IMAGES)
    if len(names) < 2:
        raise ValueError(f"{folder} holds {len(names)} images ({' '.join(_IMAGES)}); two at least are needed.")
    return [inside(folder, name, f"the folder {folder}") for name in names]


def _check_two(features: Tensor) -> None:
    if len(features) < 2:
        raise ValueError(f"A distance between distributions needs two images at least, but has {len(features)}.")
