"""The errors a user can cause. Each message names the key, file or layer, and says what to do."""


class ArchnetError(Exception):
    """Base of every error that archnet raises on purpose; shown as one line, without traceback."""


class ConfigError(ArchnetError):
    """A config key, group option or value that cannot be."""


def printable(text: object, most: int | None = 200) -> str:
    """Text that a file or a path holds, as one line that a terminal shows and never obeys.

    Args:
        text: any; control characters, line breaks, escape sequences and marks that turn the
            direction of writing become backslash escapes.
        most: characters that are kept, of a longer text its beginning; None: all.
    """
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in str(text)
    )
    return shown if most is None or len(shown) <= most else f"{shown[: most - 1]}…"
