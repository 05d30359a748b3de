"""The one kind of error that a user sees: a line that names the file, the field, the value and the fix."""


class ExportError(Exception):
    pass
