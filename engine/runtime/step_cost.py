"""How long a step will take, learnt from the steps before it: time ≈ base + per_decode · decode + per_prefill · prefill.

The loop feeds it measured times and asks it before each step how much prefill and how many draft tokens fit. It reads
no clock. Three numbers are fitted by recursive least squares with forgetting (Ljung, System Identification, §11.2), so
the estimate follows longer contexts and busier machines; a single slow step (the machine was elsewhere) is clipped.
"""

from __future__ import annotations

FORGETTING = 0.97
SCALES = (1.0, 1.0 / 8, 1.0 / 64)
"""Brings the three inputs (1, rows, rows) to about the same size."""
PRIOR = (0.010, 0.002, 0.020)
"""Seconds in scaled units before anything was measured; the first few steps replace them."""
WIDEST = 1e3
"""Bound of the covariance: without news in one direction its uncertainty would grow for ever."""
OUTLIER = 4.0
LEAST_S = 1e-7


class StepCost:
    """The running estimate. Pure arithmetic, a few microseconds per call."""

    def __init__(self) -> None:
        self._theta = list(PRIOR)
        self._covariance = [[WIDEST if i == j else 0.0 for j in range(3)] for i in range(3)]
        self._spread = 0.0
        self.observations = 0

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
        inputs = (SCALES[0], decode_rows * SCALES[1], prefill_rows * SCALES[2])
        covariance, theta = self._covariance, self._theta
        spreading = [sum(row[j] * inputs[j] for j in range(3)) for row in covariance]
        divisor = FORGETTING + sum(inputs[j] * spreading[j] for j in range(3))
        error = seconds - sum(inputs[j] * theta[j] for j in range(3))
        self.observations += 1
        if self.observations > 8:  # the first steps have nothing to be compared with
            limit = OUTLIER * max(self._spread, 0.02 * seconds)
            error = max(-limit, min(limit, error))
        self._spread += (abs(error) - self._spread) * (0.3 if self.observations <= 8 else 0.05)
        gain = [value / divisor for value in spreading]
        for i in range(3):
            theta[i] += gain[i] * error
        for i in range(3):
            for j in range(3):
                covariance[i][j] = (covariance[i][j] - gain[i] * spreading[j]) / FORGETTING
        largest = max(covariance[i][i] for i in range(3))
        if largest > WIDEST:
            shrink = WIDEST / largest
            for row in covariance:
                row[:] = [value * shrink for value in row]
