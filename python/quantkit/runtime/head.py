"""The head of a loaded model: a Linear over the vocabulary, which a decoding step spends most of its bytes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


class Head(nn.Linear):
    """A Linear with the parameters of `linear`, in 16 bit or fp32. Weights in bf16 are kept a second time in the
    layout of `ops.bf16_gemm`, three times as fast for one token as PyTorch's product: they are read only from then on.
    """

    packed: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        pack = linear.weight.dtype == torch.bfloat16 and not linear.weight.is_meta
        self.register_buffer("packed", ops.pack_bf16(linear.weight.detach()) if pack else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch would copy the whole weight for a 3-D slice of the last token.
        rows = x.reshape(-1, self.in_features)
        if self.packed is None:
            y = nn.functional.linear(rows, self.weight, self.bias)
        else:
            y = ops.bf16_gemm(rows, self.packed, self.out_features, bias=self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def replace_head(model: Any) -> None:
    """Put a Head in the place of the model's plain one."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(Head(head).train(head.training))
