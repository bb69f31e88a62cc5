from __future__ import annotations


class VlkrError(ValueError):
    """A user's mistake or a broken input, told in one line: what is wrong and what would be right.

    The command line prints it without a traceback and exits with 2. Line breaks and what could
    steer a terminal, from a name in somebody's file, are written as escapes.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class SampleError(VlkrError):
    """One sample of a dataset that cannot be used; the samples after it still can.

    Attributes:
        reason: what is wrong, as a predicate: ``"has no label"``.
        key: of the sample.
        shard: the tar that holds it, None for a file of its own.
    """

    def __init__(self, reason: str, *, key: str | None = None, shard: str | None = None) -> None:
        names = (shard, None if key is None else f"sample {key!r}")
        where = ", ".join(name for name in names if name)
        super().__init__(f"{where} {reason}" if where else reason)
        self.reason = reason
        self.key = key
        self.shard = shard


def printable(text: str) -> str:
    r"""Text on one line, without control characters.

    >>> printable("a \x1b[31mred\nname")
    'a \\x1b[31mred name'
    """
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )
