"""What a user can put right."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what is wrong, and what to set.

    The command line prints it without a traceback and ends with exit status 2. Every other
    exception is a bug and keeps its traceback.
    """
