"""The one error the user can put right."""


class PrepareError(ValueError):
    """A wrong flag or input; the message names the flag, its value and what would be right."""
