"""The error of the library, with the kind of it that searches go on after, and the warnings."""


class KronblocksError(ValueError):
    """A mistake in the use of the library: says what was given, what is allowed and what to write instead."""


class DoesNotFit(KronblocksError):
    """A block size with which a model cannot become as sparse, or as small, as is wanted: others may, and searches try them."""


class KronblocksWarning(UserWarning):
    """Base of all warnings that the library gives."""


class PerformanceWarning(KronblocksWarning):
    """Something works but costs more time or memory than it needs to."""


class NativeFallbackWarning(PerformanceWarning):
    """The native kernels were asked for and are not available: PyTorch's do the work."""


class OpenMPConflictWarning(PerformanceWarning):
    """The native kernels and torch use two OpenMP runtimes, whose threads compete."""
