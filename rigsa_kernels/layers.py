"""The layer as the kernels hub offers it: a forward pass alone, for a layer that somebody else defines.

The hub puts a method of such a class in the place of the adopting layer's own ``forward``, so a class here has neither
a constructor nor state. The layer to use in a model of one's own is `GatedSparseLinear` of this package.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from .format import SparsePattern
from .ops import gated_linear


class GatedLinear(nn.Module):
    """``y = x W0^T + alpha * x (m . D)^T + b`` with two products, differentiable in x, bias, values and alpha.

    The adopting layer has what stands below; `rigsa_kernels.gated_linear` says their shapes and dtypes.
    """

    can_torch_compile: bool = True

    weight: Tensor
    bias: Tensor | None
    rigsa_values: Tensor
    rigsa_alpha: Tensor
    pattern: SparsePattern

    def forward(self, x: Tensor) -> Tensor:
        return gated_linear(x, self.weight, self.bias, self.rigsa_values, self.rigsa_alpha, self.pattern, exact=True)
