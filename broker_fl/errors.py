"""The tree of errors. Every message is one line: what was expected, what came, what to do.

BrokerFLError                      the root (schemas)
├── DecodeError                    bytes that do not say what they should (schemas)
├── ConfigurationError             a setting, flag or name that cannot be
├── DataError                      a data file that is missing, truncated or of another kind
├── ManifestMismatchError          this model is not the federation's
├── PrivacyError                   a budget or an accountant that has no answer
├── BrokerError                    anything the broker answers or fails to answer
│   ├── BrokerUnavailableError     not there, or gone: worth another try
│   │   └── UntrustedBrokerError   its certificate does not prove that it is the broker
│   ├── AuthenticationError        wrong name, password or certificate
│   ├── AccessRefusedError         the broker's permissions say no
│   ├── QueueInUseError            somebody else holds it alone
│   ├── NotFoundError              no such exchange, queue or vhost
│   ├── TopologyConflictError      it is there, with other arguments
│   ├── UnroutableError            a mandatory message that no queue takes
│   ├── PublishTimeoutError        no confirmation in time: it may have arrived or not
│   ├── MessageTooLargeError       over the broker's limit
│   ├── ManagementError            the management API says no
│   └── LocalBrokerError           a private node cannot be started
├── ProcessError                   a process that we started ended badly
└── StorageError                   ledger, outbox or snapshots
    ├── StorageFullError           the disk is full
    ├── StorageInUseError          another process works with it
    ├── StorageUnavailableError    its server does not answer: worth another try
    ├── FencedError                another process leads the ledger now
    └── DamagedError               the bytes on the disk are not what was written
"""

import difflib
from collections.abc import Iterable

from schemas.errors import BrokerFLError, DecodeError

__all__ = [
    "AccessRefusedError",
    "AuthenticationError",
    "BrokerError",
    "BrokerFLError",
    "BrokerUnavailableError",
    "ConfigurationError",
    "DamagedError",
    "DataError",
    "DecodeError",
    "FencedError",
    "LocalBrokerError",
    "ManagementError",
    "ManifestMismatchError",
    "MessageTooLargeError",
    "NotFoundError",
    "PrivacyError",
    "ProcessError",
    "PublishTimeoutError",
    "QueueInUseError",
    "StorageError",
    "StorageFullError",
    "StorageInUseError",
    "StorageUnavailableError",
    "TopologyConflictError",
    "UnroutableError",
    "UntrustedBrokerError",
    "first_of",
    "nearest",
]


class ConfigurationError(BrokerFLError):
    pass


class DataError(BrokerFLError):
    pass


class ManifestMismatchError(BrokerFLError):
    pass


class PrivacyError(BrokerFLError):
    pass


class BrokerError(BrokerFLError):
    pass


class BrokerUnavailableError(BrokerError):
    pass


class UntrustedBrokerError(BrokerUnavailableError):
    pass


class AuthenticationError(BrokerError):
    pass


class AccessRefusedError(BrokerError):
    pass


class QueueInUseError(BrokerError):
    pass


class NotFoundError(BrokerError):
    pass


class TopologyConflictError(BrokerError):
    pass


class UnroutableError(BrokerError):
    pass


class PublishTimeoutError(BrokerError):
    pass


class MessageTooLargeError(BrokerError):
    pass


class ManagementError(BrokerError):
    pass


class LocalBrokerError(BrokerError):
    pass


class ProcessError(BrokerFLError):
    pass


class StorageError(BrokerFLError):
    pass


class StorageFullError(StorageError):
    pass


class StorageInUseError(StorageError):
    pass


class StorageUnavailableError(StorageError):
    pass


class FencedError(StorageError):
    pass


class DamagedError(StorageError):
    pass


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest right one, and all that there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(known: {', '.join(names)})"


def first_of(error: BaseException) -> BaseException:
    """What went wrong first in a group of tasks; the error itself where it is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
