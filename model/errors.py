"""Errors that a user can fix, and how a script prints them."""

import errno
import io
import os
import sys

CLOSED_PIPE = 128 + 13  # exit code, as of a program that SIGPIPE ends


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
    accept_any_text()
    try:
        main()
    except BadInput as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    except BrokenPipeError:  # nobody reads the output any more, as after `... | head -3`
        sys.exit(CLOSED_PIPE)
    except OSError as error:  # of a file: its name is too long, its folder not to be read, the disk full
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: {error.filename or 'the output'!s:.200} could not be read or written ({error.strerror})")
    finally:
        # now, as Python itself would complain at its end
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                discard_output(stream)


def accept_any_text():
    """Makes sure that printing fails for no character: one that can't be shown is escaped.

    Files and pipes get UTF-8 where their encoding has no Chinese, as that of a Western Windows.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            encoding = stream.encoding
            if not stream.isatty() and "图".encode(encoding, "ignore") == b"":
                encoding = "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def discard_output(stream):
    """Has stdout or stderr write to nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
