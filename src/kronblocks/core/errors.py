"""The library's error, the kinds of it that its own code catches, and its warnings."""


class KronblocksError(ValueError):
    """The library was used wrongly. The message says what was given, what is allowed and what to write instead."""


class DoesNotFit(KronblocksError):
    """A block size cannot reach the requested sparsity or number of parameters. A search tries the next size."""


class Diverged(KronblocksError):
    """Weights or loss are no longer finite. A search drops this candidate and goes on."""


class OtherSteps(KronblocksError):
    """A state was saved before its mask was frozen, by a training with another `total_steps`. Trainers word this their way.

    Args:
        known: steps of the saved training.
        end: the step at which its mask is frozen.
        step: the step at which the state was saved.
        given: steps of this training.
    """

    def __init__(self, known: int, end: int, step: int, given: int) -> None:
        self.known, self.end, self.step, self.given = known, end, step, given
        super().__init__(
            f"{self.what}: write total_steps={known}, or go on for longer from a state of step {end} or later, when the mask is "
            "frozen"
        )

    @property
    def what(self) -> str:
        """The first half of the message: what is wrong."""
        return (
            f"the state is of step {self.step} of {self.known}, and pruning ends at step {self.end}, so a training of "
            f"{self.given} steps would move its schedule"
        )


class KronblocksWarning(UserWarning):
    """Base of all warnings that the library gives."""


class PerformanceWarning(KronblocksWarning):
    """Something works but costs more time or memory than it needs to."""


class NativeFallbackWarning(PerformanceWarning):
    """The native kernels are not available, and PyTorch computes instead."""


class OpenMPConflictWarning(PerformanceWarning):
    """The native kernels and torch use two OpenMP runtimes, whose threads compete."""
