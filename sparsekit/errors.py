"""Every error that sparsekit raises on purpose.

Each is a subclass of a builtin, so that ``except ValueError`` keeps working, and of
`SparsekitError`, so that the command line can tell a mistake in the input from a defect in
sparsekit. The text names the argument, what was expected, what was given, and the remedy.
"""


class SparsekitError(Exception):
    """Base of all deliberate errors; never raised itself."""


class ArgumentError(SparsekitError, ValueError):
    """An argument has a wrong value, shape or combination."""


class ValueRangeError(ArgumentError):
    """Values are beyond the range of the type they should travel as."""


class ArgumentTypeError(SparsekitError, TypeError):
    """An argument has a wrong type or dtype."""


class UsageError(SparsekitError, ValueError):
    """A command was called with options that cannot work together (exit code 2)."""


class BackendError(SparsekitError, RuntimeError):
    """A named backend cannot run here; the text says what to install or choose."""


class MissingExtraError(SparsekitError, ImportError):
    """An optional dependency is not installed; the text names the extra to install."""


class DisagreementError(SparsekitError, RuntimeError):
    """A benchmark's sides computed different numbers, so their times cannot be compared."""


class CodecError(SparsekitError, ValueError):
    """Base of everything that `sparsekit.decode` refuses."""


class FormatError(CodecError):
    """The bytes are not a payload, or break a rule of docs/wire-format.md."""


class TruncatedError(CodecError):
    """The payload ends before the sizes in its header say it does."""


class ChecksumError(CodecError):
    """A checksum does not match the bytes that it covers."""


class VersionError(CodecError):
    """The payload has a major version or a critical code that this release does not know."""


class BudgetError(CodecError):
    """Decoding would need more bytes than the template or ``max_bytes`` allows."""


class BaseMismatchError(CodecError):
    """The payload refers to a base that was not given or has another digest.

    The sender can fall back to a payload without a base.
    """


class TemplateError(CodecError):
    """The payload's names, shapes or dtypes differ from the template's."""


class CohortError(SparsekitError, ValueError):
    """A cohort or a scan cannot be used; the text names the file and the remedy."""


class RunError(SparsekitError, RuntimeError):
    """A federation run cannot go on; the text says how to resume or repair it."""


class SparsekitWarning(UserWarning):
    """Base of all warnings that sparsekit gives; never given itself."""


class EmptiedLayerWarning(SparsekitWarning):
    """A mask leaves a layer, or filters that could have kept a weight, without any weight."""


class ScheduleWarning(SparsekitWarning):
    """A pruning schedule ends below the sparsity that was asked for."""
