"""The errors a user can cause. Each message names the key, file or layer, and says what to do."""


class ArchnetError(Exception):
    """Base of every error that archnet raises on purpose; shown as one line, without traceback."""


class ConfigError(ArchnetError):
    """A config key, group option or value that cannot be."""

    def __str__(self) -> str:
        """The message; characters of a value that would break the line or steer a terminal are
        escaped.
        """
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
