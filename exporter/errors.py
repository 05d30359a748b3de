"""The one kind of error that a user sees: a line that names the file, the field, the value and the fix."""

import reprlib

LONGEST_LINE = 1200  # characters of an error line

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


class ExportError(Exception):
    pass


def shown(value) -> str:
    """repr of a value out of a file, cut: a file may hold a list of millions."""
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """One line for a terminal, whatever a file put into it: escaped and, in the middle, cut."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE * 2 // 3]} ... {text[-LONGEST_LINE // 3 :]}"
    return text
