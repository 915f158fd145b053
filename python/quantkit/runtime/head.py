"""The head of a loaded model: a Linear over the vocabulary, which a decoding step spends most of its bytes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .linear import refuse_device


class _PackedRows(nn.Module):
    """A bf16 matrix with a row for each token of the vocabulary, there once, in the layout of `ops.bf16_gemm`."""

    packed: Tensor

    def __init__(self, packed: Tensor, rows: int, cols: int) -> None:
        super().__init__()
        self.rows, self.cols, self.dtype = rows, cols, torch.bfloat16
        self.register_buffer("packed", packed, persistent=False)

    @property
    def weight(self) -> Tensor:
        """[rows, cols], made anew each time: what is written into it is lost."""
        return ops.bf16_rows(self.packed, torch.arange(self.rows), self.cols).to(self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> _PackedRows:
        """`to`, `half`, `float`: what is given back changes its dtype. Refused: a device that has no kernels."""
        refuse_device(fn)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


class Head(_PackedRows):
    """A Linear in bf16, three times as fast for one token as PyTorch's product."""

    def __init__(self, packed: Tensor, linear: nn.Linear) -> None:
        super().__init__(packed, linear.out_features, linear.in_features)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = ops.bf16_gemm(x.reshape(-1, self.in_features), self.packed, self.out_features, bias=self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class Embedding(_PackedRows):
    """The embedding of a model whose head is the same matrix."""

    def __init__(self, packed: Tensor, embedding: nn.Embedding) -> None:
        super().__init__(packed, embedding.num_embeddings, embedding.embedding_dim)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        return ops.bf16_rows(self.packed, ids, self.cols).to(self.dtype)


class PlainHead(nn.Linear):
    """A Linear in another dtype, with the parameters of `linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch would copy the whole weight for a 3-D slice of the last token.
        y = nn.functional.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)
