"""The two exceptions that are no defect: the user can fix this, and somebody stopped the run."""


class UserError(ValueError):
    """A mistake in a flag, a file or an environment.

    The message names what is wrong, what was expected and what to do about it; the entry points print it without a
    traceback and exit with status 2. Anything else that is raised, except `Interrupted`, is a defect of this project
    and keeps its traceback.
    """


class Interrupted(Exception):
    """A signal ended the run between two steps, with everything saved.

    The entry points print the message and exit with 128 + `signum`, as a shell reports it.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
