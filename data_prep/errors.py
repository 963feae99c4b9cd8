"""Why a build ends early. Each has its own exit code, for the batch script that started it."""

from typing import ClassVar


class PrepError(Exception):
    """A build cannot go on; what was finished stays and is not done again."""

    code: ClassVar[int] = 1


class BadDocumentError(PrepError):
    """A document cannot be read, and no more are tolerated."""

    code = 21


class ChangedError(PrepError):
    """The input or the settings are not those with which the build began."""

    code = 22


class EngineError(PrepError):
    """The fast engine gave other ids than the reference."""

    code = 23


class DiskError(PrepError):
    """The disk is full, or a file cannot be written."""

    code = 24


class WorkError(PrepError):
    """A worker process died, or what it wrote is damaged."""

    code = 25
