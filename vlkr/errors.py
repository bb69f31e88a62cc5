from __future__ import annotations


class VlkrError(ValueError):
    """A user's mistake or a broken input, told in one line: what is wrong and what would be right.

    The command line prints it without a traceback and exits with 2. Line breaks and what could
    steer a terminal, from a name in somebody's file, are written as escapes.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""Text on one line, without control characters.

    >>> printable("a \x1b[31mred\nname")
    'a \\x1b[31mred name'
    """
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )
