"""What a run shows: grids of images with captions, and curves."""

import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..hub.files import printable, written_whole
from .base import Metric


LABEL = 110  # characters of a caption that are shown beside its images; the card and the report have all of it
BETTER = {"higher": "higher is better", "lower": "lower is better", "zero": "nearer to 0 is better"}
_MISSING = re.compile(r"Glyph .* missing from")
WIDEST = 200  # inches that an image takes at most; matplotlib refuses 2^16 dots


def image_grid(rows: dict[str, list[Tensor]], columns: list[str], file: Path, cell_inches: float = 1.3) -> None:
    """Writes a grid of images, a title over each column and a caption left of each row.

    Args:
        rows (`dict[str, list[Tensor]]`): Caption -> its images, RGB in 0..255, `[3, H, W]` uint8, one per column.
        columns (`list[str]`): Titles.
        file (`Path`): PNG.
        cell_inches (`float`): The side of an image at 100 dots per inch.
    """
    plt = pyplot()
    cell_inches = min(cell_inches, WIDEST / (max(len(rows), len(columns)) + 2))
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(cell_inches * (len(columns) + 1.4), cell_inches * len(rows) + 0.5),
        squeeze=False,
    )
    for row, (caption, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(
            label(caption), rotation=0, ha="right", va="center", fontsize=8, labelpad=6, parse_math=False
        )
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8, parse_math=False)
    with glyphs_told_once(file), written_whole(file) as draft:
        figure.tight_layout(pad=0.4)
        figure.savefig(draft, dpi=100)
    plt.close(figure)


def label(caption: str) -> str:
    """A caption as it stands beside its images: its beginning, in short lines, with control characters as escapes."""
    text = printable(" ".join(caption[: 2 * LABEL].split()))
    if len(text) > LABEL or len(caption) > 2 * LABEL:
        text = text[: LABEL - 1].rstrip() + "…"
    return textwrap.fill(text, 18)


@contextmanager
def glyphs_told_once(file: Path) -> Iterator[None]:
    """While an image is drawn, warns once of all characters that the font lacks, and of all else as ever."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    missing = {str(warning.message) for warning in heard if _MISSING.match(str(warning.message))}
    for warning in heard:
        if str(warning.message) not in missing:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        warnings.warn(
            f"{file}: the font lacks {len(missing)} of the characters in its captions, which are drawn as boxes.",
            stacklevel=3,
        )


def convergence_plot(
    curve: list[dict[str, float]],
    switches: list[int],
    levels: dict[str, dict[str, float]],
    metrics: dict[str, Metric],
    file: Path,
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    last: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes the measures over generator updates, on the panels that their metrics name, each with the direction that is better.
    A panel of which lower is better is logarithmic, if it can be.

    Args:
        curve (`list[dict]`): Rows with `step` and measures.
        switches (`list[int]`): Steps at which the target changed.
        levels (`dict[str, dict[str, float]]`): Horizontal lines: label -> measures, as of the teacher.
        metrics (`dict[str, Metric]`): Which measures are drawn.
        file (`Path`): PNG.
        intervals (`dict[str, dict[str, Sequence[float]]]`, *optional*): Bands around the lines: label -> measure -> lower and
            upper end.
        last (`dict[str, Sequence[float]]`, *optional*): The interval of the curve's last row: measure -> lower and upper end.
    """
    plt = pyplot()
    rows = {
        name: [row for row in curve if name in row] for name in metrics
    }  # a resumed run may measure something else
    names = [name for name in metrics if rows[name]]
    kinds = dict.fromkeys(metrics[name].panel for name in names)
    panels = [[name for name in names if metrics[name].panel == kind] for kind in kinds] or [[]]
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 3 * len(panels)), sharex=True, squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for colour, name in enumerate(panel):
            steps, values = [row["step"] for row in rows[name]], [row[name] for row in rows[name]]
            axis.plot(steps, values, "o-", ms=3, label=metrics[name].label)
            for style, (label, level) in zip(("--", ":"), levels.items(), strict=False):
                if name in level:
                    axis.axhline(
                        level[name],
                        ls=style,
                        lw=1,
                        color=f"C{colour}",
                        alpha=0.7,
                        label=f"{label}: {metrics[name].label}",
                    )
                if band := (intervals or {}).get(label, {}).get(name):
                    axis.axhspan(*band, color=f"C{colour}", alpha=0.12, lw=0)
            if steps and (band := (last or {}).get(name)):
                axis.vlines(steps[-1], *band, lw=3, alpha=0.5, color=f"C{colour}")
        for number, step in enumerate(switches):
            axis.axvline(step, color="0.6", lw=1, label="target switch" if number == 0 else None)
        if all(metrics[name].direction == "lower" and row[name] > 0 for name in panel for row in rows[name]):
            axis.set_yscale("log")
        axis.set_ylabel(", ".join(dict.fromkeys(BETTER[metrics[name].direction] for name in panel)), fontsize=8)
        axis.legend(fontsize=7, loc="best")
    axes[-1, 0].set_xlabel("generator updates")
    figure.tight_layout()
    with written_whole(file) as draft:
        figure.savefig(draft, dpi=100)
    plt.close(figure)


def pyplot() -> Any:
    """`matplotlib.pyplot`, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
