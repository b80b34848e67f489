"""The error of the library, its kinds that the library's own code looks for, and the warnings."""


class KronblocksError(ValueError):
    """A mistake in the use of the library: says what was given, what is allowed and what to write instead."""


class DoesNotFit(KronblocksError):
    """This block size cannot reach the requested sparsity or size; a search goes on with the next one."""


class Diverged(KronblocksError):
    """A training whose weights or loss are no longer finite: searches go on with the others."""


class OtherSteps(KronblocksError):
    """A training of another number of steps than a state's, before the mask is frozen: each trainer has its own words for that.

    Args:
        known: steps of the state's training.
        end: the step at which its mask is frozen.
        step: where it is.
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
        """What is wrong, without what to write."""
        return (
            f"the state is of step {self.step} of {self.known}, and pruning ends at step {self.end}, so a training of "
            f"{self.given} steps would move its schedule"
        )


class KronblocksWarning(UserWarning):
    """Base of all warnings that the library gives."""


class PerformanceWarning(KronblocksWarning):
    """Something works but costs more time or memory than it needs to."""


class NativeFallbackWarning(PerformanceWarning):
    """The native kernels were asked for and are not available: PyTorch's do the work."""


class OpenMPConflictWarning(PerformanceWarning):
    """The native kernels and torch use two OpenMP runtimes, whose threads compete."""
