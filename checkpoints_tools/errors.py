"""What can go wrong in a conversion besides a damaged checkpoint."""

from megalemur.checkpoint.errors import CheckpointError


class ConversionError(CheckpointError):
    """A source that is not what its format says, or a destination that cannot be made of it."""


class CertificateError(CheckpointError):
    """What was written is not what was read."""


class RequestError(ValueError):
    """Something that a user wrote cannot be used: an option, a file of prompts, a list of checkpoints."""
