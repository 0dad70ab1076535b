"""What a tuned model is moved towards: the next token of a text, or the outputs of the dense model.

Pure functions of outputs, in float32 at least. B = windows or lines, T = tokens in each, V = vocabulary, w = width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy (nats) of all tokens ``ids`` (B x T) but the first of each window; logits: B x T x V."""
    return F.cross_entropy(_wide(logits[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def divergence(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of the Kullback-Leibler divergence (nats) of the wanted distribution from the model's one.

    logits, wanted  B x T x V, the latter of the dense model
    temperature     both are divided by it; its square times the divergence is returned, so that gradients keep their
                    size (Hinton et al. 2015)
    """
    found, target = (F.log_softmax(_wide(t) / temperature, -1).flatten(0, 1) for t in (logits, wanted))
    return temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)


def output_error(outputs: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of token outputs (B x T x w) over the squared size of the wanted ones, of tokens under the mask."""
    found, target = _wide(outputs), _wide(wanted)
    if mask is not None:
        found, target = (t * mask.unsqueeze(-1) for t in (found, target))
    return (found - target).square().sum() / target.square().sum()


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
