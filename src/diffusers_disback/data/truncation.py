"""Prompts that are longer than a text encoder reads: told once with their number, not by every batch that holds one."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


LOOKED_AT = 20_000  # prompts, at most; of more, as many from all over
_TOLD = {  # by whom, and how what is said of every batch begins
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": "The following part of your input was truncated",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl": "The following part of your input was truncated",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3": "The following part of your input was truncated",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha": "The following part of your input was truncated",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma": "The following part of your input was truncated",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",
}


def truncation(tokenizers: Sequence[Any], prompts: Sequence[str], what: str = "prompts") -> str | None:
    """How many prompts are cut off, in words; `None` if none is.

    Args:
        tokenizers (`Sequence`): Of the text encoders; transformers'.
        prompts (`Sequence[str]`): Any. Of more than 20,000 as many are looked at, from all over.
        what (`str`): They are called.
    """
    number = min(len(prompts), LOOKED_AT)
    places = [row * len(prompts) // number for row in range(number)]
    cut, lengths = 0, [tokenizer.model_max_length for tokenizer in tokenizers]
    for first in range(0, number, 1000):
        batch = [prompts[place] for place in places[first : first + 1000]]
        ids = [tokenizer(batch, truncation=False, verbose=False).input_ids for tokenizer in tokenizers]
        cut += sum(
            any(len(own) > length for own, length in zip(row, lengths, strict=True)) for row in zip(*ids, strict=True)
        )
    if not cut:
        return None
    return (
        f"{cut:,} of {number:,} {what}{' that were looked at' if number < len(prompts) else ''} "
        f"{'is' if cut == 1 else 'are'} longer than the text encoder's {min(lengths)} tokens: the rest is cut off."
    )


@contextmanager
def told_once() -> Iterator[None]:
    """While prompts are encoded, what diffusers and transformers say of every one that is cut off is left out. Their other
    warnings are not."""

    class Others(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return not record.getMessage().startswith(_TOLD[record.name])

    others = Others()
    loggers = [logging.getLogger(name) for name in _TOLD]
    for logger in loggers:
        logger.addFilter(others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(others)
