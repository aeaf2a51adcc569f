"""TLS as the settings say it, and what goes wrong with it in one line: which certificate, why, and what to do."""

import asyncio
import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from broker_fl.config import BrokerSettings, PemKey, is_pem
from broker_fl.errors import AuthenticationError, BrokerError, BrokerUnavailableError, ConfigurationError, UntrustedBrokerError

_REVOCATIONS = "-----BEGIN X509 CRL-----"

_NOT_YET_VALID, _EXPIRED, _SELF_SIGNED, _REVOKED = 9, 10, 18, 23
_WRONG_NAME = (62, 64)
"""Of a host, of an address."""
_UNKNOWN_CA = (2, 19, 20, 21)
"""The issuer is not there, its certificate neither; or it is, sent by the broker itself."""
_NO_REVOCATIONS, _REVOCATIONS_EXPIRED = 3, 12
_WRONG_PURPOSE = 26

_CANNOT_JUDGE = ("BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "INTERNAL_ERROR")
"""What RabbitMQ sends where its own list of revoked certificates is missing or damaged (the third on 4.0): worth another try."""
_HUNG_UP = (ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError, ssl.SSLEOFError)
_SAYS_NOTHING = (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_LAST_WORDS_S = 3.0


def tls_context(broker: BrokerSettings) -> ssl.SSLContext:
    """TLS 1.2 or newer, with the broker's name checked, and its certificate by `ca` alone where that is given; by its lists of
    revoked certificates too, where it has some. Shows `certificate` to brokers that ask for one.

    Reads files. Raises ConfigurationError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The common name is a user's: only alternative names are a host's.
    context.hostname_checks_common_name = False
    if broker.ca is None:
        context.load_default_certs()
    else:
        _trust(context, broker)
    if broker.certificate is not None:
        _load_certificate(context, broker)
    return context


def management_tls(broker: BrokerSettings) -> ssl.SSLContext | None:
    """As for AMQP; None where the management API is not reached by https."""
    return tls_context(broker) if broker.management().get_secret_value().startswith("https:") else None


def _trust(context: ssl.SSLContext, broker: BrokerSettings) -> None:
    # From a text, Python takes certificates only, and no lists of revoked ones.
    with _file_of(broker, "ca") as file, _configured("[broker] ca holds no certificates in PEM"):
        context.load_verify_locations(cafile=file)
    if _REVOCATIONS in broker.pem("ca"):
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_certificate(context: ssl.SSLContext, broker: BrokerSettings) -> None:
    def refuse() -> str:
        raise ConfigurationError("[broker] certificate_key is encrypted: give it without a password, in a file of mode 0600")

    with (
        _file_of(broker, "certificate") as certificate,
        _file_of(broker, "certificate_key") as key,
        _configured("[broker] certificate and certificate_key are not a certificate and its key in PEM"),
    ):
        context.load_cert_chain(certificate, key, password=refuse)


@contextmanager
def _file_of(broker: BrokerSettings, key: PemKey) -> Iterator[str]:
    """OpenSSL reads keys from files only: a text goes through one of our own, mode 0600, for a moment."""
    text, written = broker.pem(key), broker.written(key)
    if not is_pem(written):
        yield written
        return
    handle, name = tempfile.mkstemp(prefix="broker-fl-", suffix=".pem")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as sink:
            sink.write(text)
        yield name
    finally:
        Path(name).unlink()


@contextmanager
def _configured(what: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as exc:
        raise ConfigurationError(f"{what} ({exc.reason or 'unreadable'})") from None


async def explained(
    error: BaseException,
    *,
    where: str,
    address: tuple[str, int],
    context: ssl.SSLContext,
    own: str | None,
    hung_up: bool = False,
) -> BrokerError | None:
    """Why a connection could not be opened, as TLS says it; None where it is no matter of TLS. `where` names whom we talked to,
    `own` the certificate that we showed; `hung_up` where the error does not say by itself that the other side did.

    UntrustedBrokerError: we refuse its certificate. AuthenticationError: it refuses ours, or misses one. BrokerUnavailableError:
    whatever else, also where it has no means to judge ours.
    """
    found = _said(error)
    if found is None and (hung_up or any(isinstance(cause, _HUNG_UP) for cause in _causes(error))):
        found = await _last_words(address, context)
    return None if found is None else _ours(found, where=where, own=own)


async def _last_words(address: tuple[str, int], context: ssl.SSLContext) -> ssl.SSLError | None:
    """In TLS 1.3 the other side judges our certificate when for us the handshake is over. What it says is lost where our first
    message meets a closed socket: once more, and we only listen."""
    try:
        async with asyncio.timeout(_LAST_WORDS_S):
            reader, writer = await asyncio.open_connection(*address, ssl=context)
            try:
                await reader.read(1)
            finally:
                writer.close()
    except (OSError, TimeoutError) as exc:
        return _said(exc)
    return None


def _ours(error: ssl.SSLError, *, where: str, own: str | None) -> BrokerError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return UntrustedBrokerError(f"the certificate of {where} {_distrusted(error)}")
    _, is_alert, alert = (error.reason or "").partition("ALERT_")
    if is_alert and (refusal := _refused(alert, own)):
        kind = BrokerUnavailableError if alert in _CANNOT_JUDGE else AuthenticationError
        return kind(f"{where} {refusal}")
    if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return BrokerUnavailableError(f"{where} does not speak TLS: is the port right (5671 for amqps, 15671 for https)?")
    reason = error.reason or " ".join(str(error).split())
    return BrokerUnavailableError(f"no TLS with {where}: {reason.replace('_', ' ').lower()}")


def _said(error: BaseException) -> ssl.SSLError | None:
    found = (cause for cause in _causes(error) if isinstance(cause, ssl.SSLError) and not isinstance(cause, _SAYS_NOTHING))
    return next(found, None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes and theirs. aiormq raises some again, so that they are causes of each other."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and not any(one is other for other in seen):
            yield one
            seen.append(one)
            waiting += (one.__context__, one.__cause__)


def _distrusted(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "has expired, or this machine's clock is wrong: renew it by `broker-fl certs issue NAME --server --renew`"
    if code == _NOT_YET_VALID:
        return "is not valid yet: is this machine's clock right?"
    if code in _WRONG_NAME:
        return (
            f"is for another host ({' '.join(error.verify_message.split()).rstrip('.')}): connect by a name that is in it, or "
            "issue one with this name (`broker-fl certs issue NAME --server --host HOST`)"
        )
    if code == _SELF_SIGNED:
        return "is self-signed, and not the one of [broker] ca: is it the right broker, and [broker] ca the file of its CA?"
    if code in _UNKNOWN_CA:
        return "is from an unknown CA: is it the right broker, and [broker] ca the file of its CA?"
    if code == _REVOKED:
        return "is revoked: it needs a new one, and whoever has its key can pretend to be the broker"
    if code in (_NO_REVOCATIONS, _REVOCATIONS_EXPIRED):
        return "cannot be checked: the list of revoked certificates in [broker] ca is of another CA, or has run out"
    if code == _WRONG_PURPOSE:
        return "is none for a server: issue one by `broker-fl certs issue NAME --server`"
    return f"is not trusted: {' '.join(error.verify_message.split())}"


def _refused(alert: str, own: str | None) -> str | None:
    """By what the other side told before it hung up; None where that is not about a certificate."""
    if alert == "CERTIFICATE_REQUIRED" or (own is None and alert in ("HANDSHAKE_FAILURE", "BAD_CERTIFICATE")):
        return "asks for a certificate, and none came: set [broker] certificate and certificate_key, from its CA"
    reasons = {
        "CERTIFICATE_EXPIRED": "it has expired, get a new one",
        "UNKNOWN_CA": "it is from an unknown CA, get one from the broker's own",
        "CERTIFICATE_REVOKED": "it is revoked, get a new one",
        "BAD_CERTIFICATE": "it cannot be checked; it signs itself, or the broker's list of revoked ones is missing or too old",
        "HANDSHAKE_FAILURE": "it is none for a client (issue one without --server), or of a kind that the broker does not know",
        "UNSUPPORTED_CERTIFICATE": "it is none for a client (issue one without --server)",
        "CERTIFICATE_UNKNOWN": "it cannot be checked, and the broker's log says why",
        "INTERNAL_ERROR": "it cannot be checked, and the broker's log says why",
    }
    return f"refuses {own or 'our certificate'}: {reasons[alert]}" if alert in reasons else None
