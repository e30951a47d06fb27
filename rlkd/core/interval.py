"""How often to save."""

import math

FIRST_SAVE_S = 5.0  # what a save is taken to last before one was measured


def interval_s(save_s: float | None, between_failures_s: float) -> float:
    """Seconds between saves that lose the least work: √(2 · save · mean time between failures).

    J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974. `save_s` None: no
    save was measured yet.
    """
    return math.sqrt(2 * (save_s or FIRST_SAVE_S) * between_failures_s)
