"""Instance norm, 2x2x2 max pooling and ReLU in two passes over memory, with Numba.

Each channel of each sample is independent, so the kernels are serial and release the GIL; the
caller spreads channels over threads. README.md has the formulas.
"""

import numba
import numpy as np

# Only in sums may the compiler reorder, to use vector registers. None of these flags assumes
# finite numbers, so NaN and infinity go through as in torch.
_SUMS = {"contract", "reassoc", "nsz"}
_REST = {"contract", "nsz"}


@numba.njit(cache=True, nogil=True, fastmath=_SUMS)
def _fast_moments(x, pivot):  # pragma: no cover - compiled
    """Mean and mean square of x - pivot; sums along w are in float32."""
    depth, height, width = x.shape
    total = 0.0
    squares = 0.0
    for d in range(depth):
        for h in range(height):
            line_total = np.float32(0.0)
            line_squares = np.float32(0.0)
            for w in range(width):
                value = x[d, h, w] - pivot
                line_total += value
                line_squares += value * value
            total += line_total
            squares += line_squares
    return total / x.size, squares / x.size


@numba.njit(cache=True, nogil=True, fastmath=_SUMS)
def _exact_moments(x):  # pragma: no cover - compiled
    """Mean and variance in two passes, in float64."""
    depth, height, width = x.shape
    total = 0.0
    for d in range(depth):
        for h in range(height):
            for w in range(width):
                total += np.float64(x[d, h, w])
    mean = total / x.size
    squares = 0.0
    for d in range(depth):
        for h in range(height):
            for w in range(width):
                value = np.float64(x[d, h, w]) - mean
                squares += value * value
    return mean, squares / x.size


@numba.njit(cache=True, nogil=True, fastmath=_SUMS)
def _gradient_moments(y, grad_y, count):  # pragma: no cover - compiled
    """Sums of the gradient behind the ReLU, and of its product with y, over count."""
    depth, height, width = y.shape
    total = 0.0
    product = 0.0
    for d in range(depth):
        for h in range(height):
            line_total = np.float32(0.0)
            line_product = np.float32(0.0)
            for w in range(width):
                value = y[d, h, w]
                grad = np.float32(0.0) if value <= 0 else grad_y[d, h, w]
                line_total += grad
                line_product += grad * value
            total += line_total
            product += line_product
    return total / count, product / count


@numba.njit(cache=True, nogil=True, fastmath=_REST)
def forward(x, eps, y, winner, statistics, row, row_winner):  # pragma: no cover - compiled
    """Fill y and what the backward pass needs, for every channel of x (channels, d, h, w).

    ``winner`` numbers the voxel of each 2x2x2 window that y was taken from, 0 to 7 in C order.
    ``statistics`` (channels, 3) receives the mean as a sum of two float32 numbers, and 1 / spread.
    ``row`` and ``row_winner`` are scratch of length w.
    """
    channels, depth, height, width = x.shape
    for c in range(channels):
        # Sums of differences to one voxel: little cancels as long as it lies near the mean.
        pivot = x[c, 0, 0, 0]
        mean, square = _fast_moments(x[c], pivot)
        variance = square - mean * mean
        if mean * mean <= 16 * variance:
            mean += pivot
        else:
            # The pivot is an outlier, or a square overflowed, or something is not finite.
            mean, variance = _exact_moments(x[c])
        # One float32 number cannot hold a mean that is large beside the spread.
        mean_high = np.float32(mean)
        mean_low = np.float32(mean - mean_high)
        rstd = np.float32(1.0 / np.sqrt(variance + eps))
        statistics[c, 0] = mean_high
        statistics[c, 1] = mean_low
        statistics[c, 2] = rstd
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
                    value = ((value - mean_high) - mean_low) * rstd
                    # Written so that NaN stays NaN.
                    y[c, d, h, w] = np.float32(0.0) if value <= 0 else value


@numba.njit(cache=True, nogil=True, fastmath=_REST)
def backward(x, y, winner, statistics, grad_y, grad_x):  # pragma: no cover - compiled
    """Fill grad_x, the gradient of x, for every channel."""
    channels, depth, height, width = x.shape
    for c in range(channels):
        mean_high = statistics[c, 0]
        mean_low = statistics[c, 1]
        rstd = statistics[c, 2]
        grad_mean, grad_product = _gradient_moments(y[c], grad_y[c], depth * height * width)
        slope = np.float32(-rstd * rstd * grad_product)
        offset = np.float32(-rstd * grad_mean)
        for d in range(depth):
            for h in range(height):
                for w in range(width):
                    grad_x[c, d, h, w] = slope * ((x[c, d, h, w] - mean_high) - mean_low) + offset
            if d % 2 == 1:
                for h in range(height // 2):
                    for w in range(width // 2):
                        if not (y[c, d // 2, h, w] <= 0):
                            k = winner[c, d // 2, h, w]
                            grad_x[
                                c, d - 1 + (k >> 2), 2 * h + ((k >> 1) & 1), 2 * w + (k & 1)
                            ] += rstd * grad_y[c, d // 2, h, w]
