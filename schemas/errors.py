"""The root of all errors of the project, and the one that the ground floor raises. The tree is drawn in broker_fl/errors.py."""


class BrokerFLError(Exception):
    """Something expected to go wrong at times; its message is one line that says what to do."""


class DecodeError(BrokerFLError):
    """Bytes that do not say what they should."""
