"""All of the values, in few bits each."""

import math
import struct
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from .base import Compressor, compressor
from .bits import (
    FLOAT,
    LARGEST,
    check_length,
    pack_planes,
    planes_size,
    unpack_floats,
    unpack_planes,
)


@compressor("qsgd")
@dataclass(frozen=True)
class QSGD(Compressor):
    """Stochastic rounding to ``levels`` steps of the norm of each bucket: unbiased.

    Alistarh et al. (NeurIPS 2017), Equation 3, and buckets as in their Section 4; Ghosh et al.,
    Section 3, example 3. With s levels and buckets of b values the variance is at most
    ``min(b / s^2, sqrt(b) / s) ||x||^2``. Message: a norm for each bucket, and sign and level of
    each value in ``ceil(log2(2 s + 1))`` bits.

    Parameters
    ----------
    levels : int
        Steps of the norm: 1 to 32767. 63 take 7 bits.
    bucket : int
        Values that share a norm; 0 for all.
    """

    levels: Annotated[int, Ge(1), Le(2**15 - 1)] = 63
    bucket: Annotated[int, Ge(0)] = 512
    carries_model: ClassVar[bool] = True

    @property
    def _bits(self) -> int:
        return math.ceil(math.log2(2 * self.levels + 1))

    def _width(self, size: int) -> int:
        return min(size, self.bucket) if self.bucket else size

    def encode(self, vector: Tensor, generator: torch.Generator | None = None) -> bytes:
        """Return the norms and the levels."""
        size = len(vector)
        width = self._width(size)
        padded = torch.zeros(-(-size // width) * width)
        padded[:size] = vector.to(torch.float32).clamp(-LARGEST, LARGEST)
        buckets = padded.view(-1, width)
        norms = torch.linalg.vector_norm(buckets, dim=1, dtype=torch.float64).clamp_max(LARGEST)
        # Norms are rounded to what travels, the values to levels of that.
        norms = norms.to(torch.float32)
        steps = torch.where(norms > 0, self.levels / norms.double(), 0.0).to(torch.float32)
        codes = (
            buckets.mul_(steps[:, None])
            .add_(torch.rand(buckets.shape, generator=generator))
            .floor_()
        )
        codes = codes.clamp_(-self.levels, self.levels).add_(self.levels).flatten()[:size]
        planes = pack_planes(codes.to(torch.int32).numpy().astype(np.uint16), self._bits)
        return bytes(norms.numpy().astype(FLOAT)) + bytes(planes)

    def decode(self, data: bytes, size: int) -> Tensor:
        """Return norm * level / levels."""
        check_length(data, self.num_bytes(size), self.name)
        width = self._width(size)
        count = -(-size // width)
        norms = unpack_floats(data[: 4 * count], count)
        if (norms < 0).any():
            raise ValueError(f"a norm is {norms.min()}; allowed: 0 or more")
        codes = unpack_planes(np.frombuffer(data, np.uint8, offset=4 * count), size, self._bits)
        if int(codes.max()) > 2 * self.levels:
            raise ValueError(f"a level is beyond the {self.levels} there are")
        values = np.zeros(count * width, np.float32)
        np.subtract(codes, self.levels, out=values[:size], casting="unsafe", dtype=np.float32)
        scaled = values.reshape(count, width)
        scaled *= (norms / np.float32(self.levels))[:, None]
        return torch.from_numpy(values[:size])

    def num_bytes(self, size: int) -> int:
        """Return 4 bytes a bucket and ``ceil(log2(2 s + 1))`` bits a value."""
        return 4 * -(-size // self._width(size)) + planes_size(size, self._bits)

    def delta(self, size: int) -> float:
        """Return ``1 - min(b / s^2, sqrt(b) / s)``, 0 where that is negative."""
        return max(0.0, 1 - self.variance(size))

    def variance(self, size: int) -> float:
        """Return the bound ``min(b / s^2, sqrt(b) / s)``."""
        width = self._width(size)
        return min(width / self.levels**2, math.sqrt(width) / self.levels)


@compressor("sign", scaled=False)
@compressor("l1-sign", scaled=True)
@dataclass(frozen=True)
class Sign(Compressor):
    """The signs; ``scaled`` by the mean magnitude: l1-sign. 0 counts as positive.

    ``l1-sign``: ``||x||_1 / d sign(x)``, Karimireddy et al. (ICML 2019); Ghosh et al., Section 3,
    example 4. Plain ``sign`` is signSGD's (Bernstein et al., ICML 2018), no compressor in the
    sense of Definition 4. Message: d bits, and 4 bytes for the scale.

    Parameters
    ----------
    scaled : bool
        Whether the mean magnitude travels, too.
    """

    scaled: bool = True

    def encode(self, vector: Tensor, generator: torch.Generator | None = None) -> bytes:
        """Return the scale and the signs."""
        head = b""
        if self.scaled:
            mean = float(vector.abs().double().mean()) if len(vector) else 0.0
            head = struct.pack("<f", min(mean, LARGEST))
        return head + np.packbits((vector >= 0).numpy()).tobytes()

    def decode(self, data: bytes, size: int) -> Tensor:
        """Return scale * sign."""
        check_length(data, self.num_bytes(size), self.name)
        scale = struct.unpack_from("<f", data)[0] if self.scaled else 1.0
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"the scale is {scale}; allowed: finite, 0 or more")
        head = 4 if self.scaled else 0
        positive = np.unpackbits(np.frombuffer(data, np.uint8, offset=head), count=size)
        return torch.from_numpy(np.array([-scale, scale], np.float32)[positive])

    def num_bytes(self, size: int) -> int:
        """Return a bit a value, and 4 bytes for the scale."""
        return (size + 7) // 8 + (4 if self.scaled else 0)

    def delta(self, size: int) -> float:
        """Return 1 / d for l1-sign: the worst case of ``||x||_1^2 / (d ||x||^2)``."""
        return 1 / size if self.scaled else 0.0
