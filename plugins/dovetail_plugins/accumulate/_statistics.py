"""What makes a window differ from its large batch, however its micro-batches are weighted."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_NUM_NAMED = 3


def warn_of_batch_statistics(model: nn.Module) -> None:
    """Warn, with their names, of modules that take statistics of each micro-batch by itself."""
    from torch.nn.modules.batchnorm import _BatchNorm

    names = [
        repr(name or type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    if names:
        more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
        warnings.warn(
            "accumulation cannot equal the large batch: batch normalisation in training mode takes "
            f"its statistics from each micro-batch, in {', '.join(names[:_NUM_NAMED])}{more}; "
            "use group or layer normalisation, or call eval() on these modules",
            stacklevel=3,
        )
