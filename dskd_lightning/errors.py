"""What a user's mistake raises."""

__all__ = ["Diverged", "UserError"]


class UserError(ValueError):
    """A mistake in a config, a file or a choice of models.

    The message is one sentence that names the file, line or key at fault and the remedy.
    The command line prints it without a traceback and exits with status 2.
    """


class Diverged(UserError):
    """Training whose loss is no number any more: a result of its settings, and no fault of anything else."""
