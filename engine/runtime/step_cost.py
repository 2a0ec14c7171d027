"""How long a step will take, learnt from those before it: time ≈ base + per_decode · decode + per_prefill · prefill.

The loop feeds it measured times and asks it before each step how much prefill and how many draft tokens fit. It reads
no clock. Base and decode are fitted by least squares to steps without prefill, and prefill is what a step took beyond
that: while a long prompt runs every step looks alike, and one fit of all three could not tell them apart. Older steps
count exponentially less, so the estimate follows longer contexts and busier machines. A step that took much longer than
expected (the machine was elsewhere) counts only in part, unless it had more rows than any before it.
"""

from __future__ import annotations

FORGETTING = 0.97
"""Weight of a step against the one after it: about 33 steps count."""
BUSY_FORGETTING = 0.95
"""What is known of decoding alone fades by this for each step with prefill since."""
PREFILL_FORGETTING = 0.85
"""The same for what prefill adds, which changes as the prompt's context grows."""
SCALES = (1.0, 1.0 / 8)
"""Brings the two inputs (1, rows) to about the same size."""
PRIOR = (0.010, 0.002)
"""Seconds in scaled units as long as nothing was measured."""
PRIOR_WEIGHT = 0.01
"""Of the guess above, in steps."""
PREFILL_PRIOR_S = 0.0003
"""For a row of prefill as long as nothing was measured."""
PREFILL_PRIOR_ROWS = 0.1
OUTLIER = 3.0
"""A step counts as this many times the expected time at most."""
SWEEPS = 6
STALE_AFTER = 64
"""Steps with prefill in a row, beside decoding, after which nobody knows what decoding alone takes."""
LEAST_S = 1e-7


class StepCost:
    """The running estimate. Pure arithmetic, some ten microseconds per step."""

    def __init__(self) -> None:
        self._theta = list(PRIOR)
        # Normal equations: products of inputs, and of inputs and times.
        self._squares = [[0.0] * 2 for _ in range(2)]
        self._times = [0.0] * 2
        self._largest = [0.0, 0.0]
        self._prefill_s, self._prefill_rows = PREFILL_PRIOR_ROWS * PREFILL_PRIOR_S, PREFILL_PRIOR_ROWS
        self._mixed = 0
        self._since_quiet = 0

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
        return max(LEAST_S, self._prefill_s / self._prefill_rows)

    @property
    def is_stale(self) -> bool:
        """A step of decoding alone should be taken soon, to learn what it takes by now."""
        return self._since_quiet >= STALE_AFTER

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
        if prefill_rows:
            self._observe_prefill(decode_rows, prefill_rows, seconds)
        else:
            self._fit(decode_rows, seconds, FORGETTING * BUSY_FORGETTING**self._since_quiet)
            self._since_quiet = 0

    def _observe_prefill(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        if decode_rows:
            self._since_quiet += 1
            if self._mixed == 0:  # rows of large steps without decoding are cheaper: they were only a first guess
                self._prefill_s = self.prefill_row_s * PREFILL_PRIOR_ROWS
                self._prefill_rows = PREFILL_PRIOR_ROWS
            self._mixed += 1
        elif self._mixed:
            return
        quiet = self.predict(decode_rows, 0)
        if seconds < quiet and decode_rows:
            self._fit(decode_rows, seconds, FORGETTING)  # without prefill it would not have taken longer
        self._prefill_s = PREFILL_FORGETTING * self._prefill_s + max(0.0, seconds - quiet)
        self._prefill_rows = PREFILL_FORGETTING * self._prefill_rows + prefill_rows

    def _fit(self, decode_rows: int, seconds: float, forgetting: float) -> None:
        inputs = (SCALES[0], decode_rows * SCALES[1])
        squares, times, theta = self._squares, self._times, self._theta
        for i in range(2):
            times[i] = forgetting * times[i] + inputs[i] * seconds
            row = squares[i]
            for j in range(2):
                row[j] = forgetting * row[j] + inputs[i] * inputs[j]
        # Coordinate descent from the last estimate; with two unknowns a few sweeps per step are enough.
        for _ in range(SWEEPS):
            for i in range(2):
                row = squares[i]
                others = row[1 - i] * theta[1 - i]
                theta[i] = max(0.0, (times[i] + PRIOR_WEIGHT * PRIOR[i] - others) / (row[i] + PRIOR_WEIGHT))
