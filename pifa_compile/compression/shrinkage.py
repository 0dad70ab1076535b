"""Second moments of few tokens, drawn towards the identity as far as their number makes it likely to help.

n = number of inputs, N = number of tokens. Oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero, IEEE
Transactions on Signal Processing 58, 2010): for independent Gaussian samples, the combination of their moments and a
multiple of the identity that is nearest to the true moments, as far as the sample itself tells.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens of one text resemble each other: so many independent ones are as good as one of them, as far as measured here.
INDEPENDENT = 0.3


def shrink(gram: Tensor, count: int) -> Tensor:
    """G (n x n, over N = ``count`` tokens), or the diagonal of it (n), drawn towards its mean power times the identity.

    The trace is kept. The fewer tokens, and the more alike the powers of all directions, the further. Without a token:
    the identity.
    """
    n = gram.shape[0]
    if gram.dim() == 1:
        return shrink(gram.diag(), count).diagonal()
    trace, square = float(gram.diagonal().sum()), float(gram.square().sum())
    identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
    if not count or trace <= 0:
        return identity
    share = shrinkage(n, count * INDEPENDENT, trace * trace / square)
    return (1 - share) * gram + share * (trace / n) * identity


def shrinkage(n: int, count: float, spread: float) -> float:
    """The share of the identity, from 0 to 1, for ``count`` independent samples.

    spread  trace(G)^2 / trace(G^2): n where all directions have the same power, 1 where one has all
    """
    apart = (count + 1 - 2 / n) * (1 - spread / n)
    return 1.0 if apart <= 0 else min(1.0, (1 - 2 / n + spread) / apart)
