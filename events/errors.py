"""What can go wrong between a caller and the log. Every error says what happened and what to do."""

from __future__ import annotations


class LedgerError(Exception):
    """Base of all errors of the log. `str()` is fit for a person; `fix` says what to do."""

    fix = ""


class LedgerUnavailable(LedgerError):
    """The server could not be reached before anything was sent: nothing was written."""

    fix = "retry; if it lasts, run `token-ledger doctor` and look at the nats-server's log"


class OutcomeUnknown(LedgerError):
    """The event was sent and no answer came within the deadline: it may or may not be in the log.

    A retry with the same event id is safe, since ids are deduplicated.
    """

    fix = "retry; the write is idempotent"


class Conflict(LedgerError):
    """Another writer appended to the subject first (err_code 10071 or 10164). Read, decide and append again."""

    fix = "read the subject again and decide anew"


class StreamFull(LedgerError):
    """The stream or the disk has reached its limit (err_code 10077 and kin): nothing was written."""

    fix = "free disk space or raise the stream's max_bytes; nothing is lost meanwhile"


class MessageTooLarge(LedgerError):
    """The event is larger than the server's max_payload or the stream's max_msg_size."""

    fix = "send less: the limits are in the README"


class UnsafeServer(LedgerError):
    """The server or a stream is configured so that acknowledged events could be lost. Names the setting."""

    fix = "correct the named setting; `token-ledger doctor` lists all of them"


class UndecodableEvent(LedgerError):
    """Bytes in the log that this version cannot read. Never skipped: skipping could lose a revocation."""

    fix = "run the version that wrote the event, or a newer one"
