"""The one error that command lines show without a traceback."""


class UserError(ValueError):
    """Something the user gave or installed cannot work; the message says what would.

    Attributes:
        every_rank: the first rank of a node may not see it, so whoever does prints it.
    """

    every_rank = False
