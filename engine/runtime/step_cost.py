"""How long a step will take, learnt from those before it: time ≈ base + per_decode · decode + per_prefill · prefill.

The loop feeds it measured times and asks it before each step how much prefill and how many draft tokens fit. It reads
no clock. Three numbers that are not negative are fitted by least squares over the last steps, older ones counting
exponentially less, so the estimate follows longer contexts and busier machines. A step that took much longer than
expected (the machine was elsewhere) counts only in part, unless it had more rows than any before it.
"""

from __future__ import annotations

FORGETTING = 0.97
"""Weight of a step against the one after it: about 33 steps count."""
SCALES = (1.0, 1.0 / 8, 1.0 / 64)
"""Brings the three inputs (1, rows, rows) to about the same size."""
PRIOR = (0.010, 0.002, 0.020)
"""Seconds in scaled units as long as nothing was measured: some 0.3 ms for a row of prefill."""
PRIOR_WEIGHT = 0.01
"""Of the guess above, in steps."""
OUTLIER = 3.0
"""A step counts as this many times the expected time at most."""
SWEEPS = 6
LEAST_S = 1e-7


class StepCost:
    """The running estimate. Pure arithmetic, some ten microseconds per step."""

    def __init__(self) -> None:
        self._theta = list(PRIOR)
        # Normal equations: products of inputs, and of inputs and times.
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._times = [0.0] * 3
        self._largest = [0.0, 0.0]

    @property
    def base_s(self) -> float:
        """Time of a step whatever its rows: the weights are read once."""
        return max(LEAST_S, self._theta[0])

    @property
    def decode_row_s(self) -> float:
        """Additional time per row of decoding or of a draft."""
        return max(LEAST_S, self._theta[1] * SCALES[1])

    @property
    def prefill_row_s(self) -> float:
        """Additional time per row of prefill."""
        return max(LEAST_S, self._theta[2] * SCALES[2])

    def predict(self, decode_rows: int, prefill_rows: int) -> float:
        """Seconds of such a step."""
        return self.base_s + self.decode_row_s * decode_rows + self.prefill_row_s * prefill_rows

    def observe(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        """Learns from a step that took `seconds`."""
        rows, largest = (decode_rows, prefill_rows), self._largest
        if rows[0] <= largest[0] and rows[1] <= largest[1]:
            seconds = min(seconds, OUTLIER * self.predict(decode_rows, prefill_rows))
        for kind in (0, 1):
            largest[kind] = max(rows[kind], FORGETTING * largest[kind])
        inputs = (SCALES[0], decode_rows * SCALES[1], prefill_rows * SCALES[2])
        squares, times, theta = self._squares, self._times, self._theta
        for i in range(3):
            times[i] = FORGETTING * times[i] + inputs[i] * seconds
            row = squares[i]
            for j in range(3):
                row[j] = FORGETTING * row[j] + inputs[i] * inputs[j]
        # Coordinate descent from the last estimate; with three unknowns a few sweeps per step are enough.
        for _ in range(SWEEPS):
            for i in range(3):
                row = squares[i]
                others = row[0] * theta[0] + row[1] * theta[1] + row[2] * theta[2] - row[i] * theta[i]
                theta[i] = max(0.0, (times[i] + PRIOR_WEIGHT * PRIOR[i] - others) / (row[i] + PRIOR_WEIGHT))
