"""What a user can put right."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what is wrong, and what to set.

    The command line prints it without a traceback and ends with exit status 2. Every other
    exception is a bug and keeps its traceback.
    """


def sentence(error: UserError) -> str:
    """What a mistake says, also one that a data loader's process has sent with its traceback."""
    message = str(error)
    if message.startswith("Caught "):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message
