"""An adapter of a linear layer of bitsandbytes in 8 bits (``Linear8bitLt``, LLM.int8).

That layer rounds its inputs as well as its weights, and keeps some columns of both in 16 bits, so what it computes is
no product with one matrix. It computes its part itself, and the adapter's product is added. Nothing is composed, and
there is no room for a difference to be merged into.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor

from rigsa.peft_tuner.adapter_linear import AdapterLinear
from rigsa_kernels.beside import add_adapter


def is_eight_bits(module: nn.Module) -> bool:
    """Whether `module` is a frozen linear layer in 8 bits."""
    weight = module._parameters.get("weight")
    return weight is not None and get_bnb_param_type(weight) == "8bit" and weight.dtype == torch.int8


class AdapterEightBits(AdapterLinear):
    """As `AdapterLinear`, over a layer in 8 bits."""

    is_quantised = True

    def __init__(self, linear: nn.Module, **options: Any) -> None:
        layer: Any = linear
        self.__dict__["_layer"] = (linear,)  # what `weight` and `bias` ask for; in a tuple, or it would be a child
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        super().__init__(plain, **options | {"in_place": False, "numerics": "exact"})

    def _hold(self, linear: nn.Linear) -> None:
        super()._hold(self._eight_bits)

    @property
    def _eight_bits(self) -> Any:
        """The layer in 8 bits."""
        return self.__dict__["_layer"][0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weight where it is decoded."""
        return torch.float32

    def frozen_matrix(self) -> Tensor:
        """W0, decoded."""
        layer = self._eight_bits
        return dequantize_bnb_weight(layer.weight, state=layer.state).float()

    def forward(self, x: Tensor) -> Tensor:
        """What the layer in 8 bits computes, and the adapter's part. The hooks of both are the same, and run once."""
        if self._awaited is not None:
            self._take_saved()
        y = self._eight_bits.forward(x)
        return add_adapter(y, x.to(y.dtype), self.rigsa_values, self.rigsa_alpha, self.pattern)
