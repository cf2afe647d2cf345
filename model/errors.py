"""What people can mend, and how a script tells them."""

import sys


class BadInput(Exception):
    """Something that the person at the keyboard can mend; the message says what and how, and scripts print it alone."""


class BadRecord(BadInput):
    """A record of the data, or a picture of it, that can't be used. `reason` is what reports count by."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # between processes
        return BadRecord, (self.reason, str(self))


def run_script(main):
    """Runs a script's main; what people can mend is told in one line, with exit code 1."""
    try:
        main()
    except BadInput as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("stopped")
