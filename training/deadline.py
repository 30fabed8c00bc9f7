"""The time that a run may take, `--train.max_minutes`: when it ends, and where in its schedule it is."""

from __future__ import annotations

from time import monotonic

from training.state import TrainState


class Deadline:
    """The end of a run by the clock.

    All time of the loop counts: compiling, steps, and evaluations and checkpoints on the way; the evaluation at the end
    comes after it. The time used so far is kept in `state.seconds`, so that a run that was stopped has the rest. All
    ranks have the same value there: the loop takes the mean of their clocks at the end of each step.

    minutes: of the whole run; 0: no limit.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.limit = minutes, 60 * minutes
        self.told = False
        self.start(TrainState())

    def start(self, state: TrainState) -> None:
        """Let the clock go on from where `state` was saved."""
        self.began = monotonic() - state.seconds

    def elapsed(self) -> float:
        """Return the seconds of the run so far, by the clock of this process."""
        return monotonic() - self.began

    def passed(self, state: TrainState) -> bool:
        """Return whether the time is up."""
        return 0 < self.limit <= state.seconds

    def share(self, state: TrainState) -> float:
        """Return the share of the time that is used, 0 without a limit.

        The first step is left out, of the time and of the limit: it compiles the model, which is no training. Else a
        long compilation would be taken for a part of the warm-up.
        """
        if not self.limit or not state.step:
            return 0.0
        left = self.limit - state.first_step_seconds
        return min(1.0, (state.seconds - state.first_step_seconds) / left) if left > 0 else 1.0

    def left(self, state: TrainState) -> float:
        """Return the seconds that are left; infinitely many without a limit."""
        return max(0.0, self.limit - self.elapsed()) if self.limit else float("inf")

    def fewer_steps(self, state: TrainState, total_steps: int) -> str | None:
        """Return a sentence where the steps take longer than the time, once a fiftieth of it is used; else None."""
        if self.told or self.share(state) < 0.02 or state.step < 2:
            return None
        self.told = True
        a_step = (state.seconds - state.first_step_seconds) / (state.step - 1)
        steps = state.step + int((self.limit - state.seconds) / a_step)
        if steps >= total_steps:
            return None
        whole = (state.seconds + (total_steps - state.step) * a_step) / 60
        return (
            f"{total_steps:,} steps would take {whole:,.1f} minutes here: about {steps:,} are trained in the "
            f"{self.minutes:g} of --train.max_minutes, and the learning rate falls with the time"
        )
