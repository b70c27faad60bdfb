"""AdamW, and its relatives of bitsandbytes."""

from typing import Any

import torch
from torch import nn

from .config import TrainingConfig


def optimizer_of(
    role: str, parameters: list[nn.Parameter], learning_rate: float, config: TrainingConfig, is_scaled: bool
) -> torch.optim.Optimizer:
    """AdamW: torch's, or that of bitsandbytes with states of 8 bits, or in pages that a full GPU moves out.

    Torch's is fused unless the loss is scaled, as for fp16: accelerate could then not see what is skipped.

    Raises:
        ValueError: If bitsandbytes is asked for and not installed.
    """
    arguments: dict[str, Any] = {
        "lr": learning_rate,
        "betas": config.adam_betas(role),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam and not config.use_paged_adam:
        return torch.optim.AdamW(parameters, fused=not is_scaled, **arguments)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "--use_8bit_adam and --use_paged_adam need bitsandbytes: `pip install bitsandbytes`."
        ) from error
    kinds = {
        (True, False): bitsandbytes.optim.AdamW8bit,
        (True, True): bitsandbytes.optim.PagedAdamW8bit,
        (False, True): bitsandbytes.optim.PagedAdamW32bit,
    }
    return kinds[config.use_8bit_adam, config.use_paged_adam](parameters, **arguments)
