"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in a flag, a file or an environment.

    The message names what is wrong, what was expected and what to do about it; the entry points print it without a
    traceback and exit with status 2. Anything else that is raised is a defect of this project and keeps its traceback.
    """
