"""Parameters in the type that products run in.

fp32 parameters under bf16 autocast are rounded for every product. The modules do so in every
forward; here one bf16 copy of the flat buffer is written in one pass a rollout, at 2 bytes a
parameter, and q|k|v and gate|up lie side by side in it as in the buffer. Parameters that are bf16
already are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.engine.sharded_views import Weights


class ComputeWeights:
    """Views of aliased parameters in `dtype`.

    Args:
        weights: the parameters.
        dtype: of the products.
        version: of the weights. A copy that was kept is written again if this or PyTorch's count of
            in-place changes has moved; None: at every rollout.
        keep: hold the copy between rollouts.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        *,
        version: Callable[[], int] | None = None,
        keep: bool = False,
    ) -> None:
        self.dtype = dtype
        self._weights = weights
        self._version = version
        self._keep = keep
        self._copied: tuple[int, int] | None = None
        self._source: Tensor | None = None
        self._copy: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the copy holds now."""
        return 0 if self._copy is None else self._copy.untyped_storage().nbytes()

    @property
    def coming(self) -> int:
        """Bytes that `refresh` will take beyond `nbytes`."""
        return 0 if self._copy is None else self._size - self.nbytes

    @property
    def _size(self) -> int:
        assert self._copy is not None
        return self._copy.numel() * self._copy.itemsize

    def view(self, parameter: Tensor) -> Tensor:
        """The parameter, or a view over adjacent ones, in `dtype`.

        Its values are there between `refresh` and `release`. Views are made before `free`.
        """
        if parameter.dtype is self.dtype:
            return parameter
        if self._copy is None:
            self._source = self._weights.buffer(parameter.dtype)
            with torch.inference_mode(False):
                self._copy = torch.empty_like(self._source, dtype=self.dtype)
        return self._copy.as_strided(
            parameter.shape, parameter.stride(), parameter.storage_offset()
        )

    def refresh(self) -> None:
        """Round the parameters as they are now."""
        if self._copy is None or self._source is None:
            return
        now = None
        if self._version is not None:
            # Weights may be written without a new version, and versions counted without a write
            # that PyTorch sees: both have to stand still.
            now = (self._version(), self._weights.changes)
            if now == self._copied:
                return
        storage = self._copy.untyped_storage()
        if storage.nbytes() != self._size:
            storage.resize_(self._size)
        with torch.no_grad():
            self._copy.copy_(self._source)
        self._copied = now

    def release(self) -> None:
        """After a rollout: give the copy's memory back, unless it is to be kept."""
        if not self._keep:
            self.free()

    def free(self) -> None:
        """Give the copy's memory back; its views stay, and hold values again after `refresh`."""
        self._copied = None
        if self._copy is not None:
            self._copy.untyped_storage().resize_(0)
