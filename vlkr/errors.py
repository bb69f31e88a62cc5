class VlkrError(ValueError):
    """A user's mistake or a broken input, told in one line: what is wrong and what would be right.

    The command line prints it without a traceback and exits with 2.
    """
