"""Every error that mlagen raises on purpose.

Each message names the input, what it was, what it may be and, where there is one, the remedy.  The command line prints the message
as one line and exits with `exit_status`: 2 where the request itself is wrong, 1 where doing it failed.
"""


class MlagenError(Exception):
    """Base of all errors raised on purpose."""

    exit_status = 1


class RequestError(MlagenError, ValueError):
    """The request itself is wrong: nothing was built, launched or written."""

    exit_status = 2


class ModelError(RequestError):
    """A model that is unknown, unreadable or not MLA."""


class SpecError(RequestError):
    """A combination of dimensions, dtypes and options that no kernel can serve."""


class TargetError(RequestError):
    """An architecture that is unknown or not supported."""


class ArgumentError(RequestError):
    """A wrong argument of a launch: shape, dtype, device, stride or value.  Raised before anything is launched."""


class ProgramError(MlagenError):
    """An ill-typed or ill-ordered Program; the message names the stage and the reason."""


class ScheduleError(MlagenError):
    """A schedule that does not prove: registers, LDS, or the coverage of an output."""


class ToolchainError(MlagenError):
    """A compiler that is missing or cannot be used; the message says how to get one."""


class BuildError(MlagenError):
    """A compile or a write that failed; nothing half-written is left behind."""


class MissingKernelError(MlagenError):
    """A kernel that is in no bundle and no cache while MLAGEN_JIT=0 forbids the compiler; the message says how to build it."""


class VerificationError(MlagenError):
    """A kernel whose result differs from the oracle by more than its arithmetic allows."""
