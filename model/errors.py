"""Errors that a user can fix, and how a script prints them."""

import sys


class BadInput(Exception):
    """An error the user can fix. The message says what is wrong and what to do; scripts print it without a traceback."""


class BadRecord(BadInput):
    """A record, or one of its pictures, that can't be used. Reports are grouped by `reason`."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # picklable: DataLoader workers raise it
        return BadRecord, (self.reason, str(self))


def run_script(main):
    """Runs a script's main; user errors are printed as one line, with exit code 1."""
    try:
        main()
    except BadInput as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("stopped")
