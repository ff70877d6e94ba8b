"""Instance norm, 2x2x2 max pooling and ReLU in two passes over memory, with Numba.

Each channel of each sample is independent, so the kernels are serial and release the GIL; the
caller spreads channels over threads. README.md has the formulas.
"""

import numba
import numpy as np
import numpy.typing as npt

# Reordering sums lets the compiler use vector registers; nothing here assumes finite numbers,
# so NaN and infinity go through as in torch.
_FLAGS = {"contract", "reassoc", "nsz"}

Floats = npt.NDArray[np.float32]


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def forward(  # type: ignore[no-untyped-def]
    x, eps, y, winner, mean, rstd, row, row_winner
):  # pragma: no cover - compiled
    """Fill y and what the backward pass needs, for every channel of x (channels, d, h, w).

    ``winner`` numbers the voxel of each 2x2x2 window that y was taken from, 0 to 7 in C order.
    ``row`` and ``row_winner`` are scratch of length w.
    """
    channels, depth, height, width = x.shape
    count = depth * height * width
    for c in range(channels):
        # Sums of differences to one voxel of the channel: no cancellation when mean >> spread.
        pivot = x[c, 0, 0, 0]
        total = 0.0
        squares = 0.0
        for d in range(depth):
            for h in range(height):
                line_total = np.float32(0.0)
                line_squares = np.float32(0.0)
                for w in range(width):
                    value = x[c, d, h, w] - pivot
                    line_total += value
                    line_squares += value * value
                total += line_total
                squares += line_squares
        shifted = total / count
        variance = max(squares / count - shifted * shifted, 0.0)
        if np.isnan(total):
            variance = np.nan
        channel_mean = np.float32(pivot + shifted)
        channel_rstd = np.float32(1.0 / np.sqrt(variance + eps))
        mean[c] = channel_mean
        rstd[c] = channel_rstd
        for d in range(depth // 2):
            for h in range(height // 2):
                for w in range(width):
                    best = x[c, 2 * d, 2 * h, w]
                    which = np.uint8(0)
                    value = x[c, 2 * d, 2 * h + 1, w]
                    which = np.uint8(2) if value > best else which
                    best = value if value > best else best
                    value = x[c, 2 * d + 1, 2 * h, w]
                    which = np.uint8(4) if value > best else which
                    best = value if value > best else best
                    value = x[c, 2 * d + 1, 2 * h + 1, w]
                    which = np.uint8(6) if value > best else which
                    best = value if value > best else best
                    row[w] = best
                    row_winner[w] = which
                for w in range(width // 2):
                    left = row[2 * w]
                    right = row[2 * w + 1]
                    left_winner = row_winner[2 * w]
                    right_winner = np.uint8(row_winner[2 * w + 1] + 1)
                    # Of equal values the first in C order wins, as in torch.
                    take = (right > left) or (right == left and right_winner < left_winner)
                    value = right if take else left
                    winner[c, d, h, w] = right_winner if take else left_winner
                    value = (value - channel_mean) * channel_rstd
                    # Written so that NaN stays NaN.
                    y[c, d, h, w] = np.float32(0.0) if value <= 0 else value


@numba.njit(cache=True, nogil=True, fastmath=_FLAGS)
def backward(  # type: ignore[no-untyped-def]
    x, y, winner, mean, rstd, grad_y, grad_x
):  # pragma: no cover - compiled
    """Fill grad_x, the gradient of x, for every channel."""
    channels, depth, height, width = x.shape
    count = depth * height * width
    for c in range(channels):
        total = 0.0
        product = 0.0
        for d in range(depth // 2):
            for h in range(height // 2):
                line_total = np.float32(0.0)
                line_product = np.float32(0.0)
                for w in range(width // 2):
                    value = y[c, d, h, w]
                    grad = np.float32(0.0) if value <= 0 else grad_y[c, d, h, w]
                    line_total += grad
                    line_product += grad * value
                total += line_total
                product += line_product
        slope = -rstd[c] * rstd[c] * (product / count)
        offset = np.float32(-rstd[c] * (total / count) - slope * mean[c])
        slope = np.float32(slope)
        for d in range(depth):
            for h in range(height):
                for w in range(width):
                    grad_x[c, d, h, w] = slope * x[c, d, h, w] + offset
            if d % 2 == 1:
                for h in range(height // 2):
                    for w in range(width // 2):
                        if not (y[c, d // 2, h, w] <= 0):
                            k = winner[c, d // 2, h, w]
                            grad_x[
                                c, d - 1 + (k >> 2), 2 * h + ((k >> 1) & 1), 2 * w + (k & 1)
                            ] += rstd[c] * grad_y[c, d // 2, h, w]
