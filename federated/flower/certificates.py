"""Whether a certificate fits, told in one sentence before a federation begins.

    python -m mergesolve.federated.flower.certificates 127.0.0.1:9443 --ca ca.crt
    python -m mergesolve.federated.flower.certificates --certificate server.crt --key server.key

Flower says `CERTIFICATE_VERIFY_FAILED` in the log of a SuperNode, which then ends; its command line says that the
connection is unavailable, whatever the reason; a SuperNode with --insecure tries again without end.
"""

from __future__ import annotations

import socket
import ssl
import sys

import click

from ..errors import FederationError

EXPIRED, SELF_SIGNED, UNKNOWN_ISSUER, WRONG_NAME, WRONG_IP = 10, 19, 20, 62, 64  # of X509_verify_cert


def check_server(address: str, ca: str, timeout: float = 10.0) -> str:
    """Shake hands with a SuperLink as a SuperNode with `--root-certificates ca` would; return one line about it.

    Raises FederationError if the certificate does not fit, and if nothing or no TLS is at HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise FederationError(f"flower: the address {address!r} is not HOST:PORT.")
    context = _authority(ca)
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout) as plain,
            context.wrap_socket(plain, server_hostname=host.strip("[]")) as wrapped,
        ):
            return f"{address} answers with a certificate that {ca} vouches for ({wrapped.version()})"
    except ssl.SSLCertVerificationError as error:
        raise FederationError(f"flower: {address} and {ca} do not fit: {_reason(error, host)}") from error
    except ssl.SSLError as error:
        raise FederationError(
            f"flower: {address} does not speak TLS ({error.reason}). Start the SuperLink with --ssl-ca-certfile, "
            "--ssl-certfile and --ssl-keyfile, not with --insecure."
        ) from error
    except OSError as error:
        raise FederationError(f"flower: nothing answers at {address} ({error}). Is the SuperLink started?") from error


def check_pair(certificate: str, key: str) -> str:
    """Return one line if the key belongs to the certificate, as the SuperLink needs it; else raise FederationError."""
    _exists(certificate)
    _exists(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        why = (
            "the key is of another certificate"
            if error.reason == "KEY_VALUES_MISMATCH"
            else f"one of them is no PEM file of its kind ({error.reason})"
        )
        raise FederationError(f"flower: {certificate} and {key} do not fit: {why}.") from error
    return f"{key} is the key of {certificate}"


def _authority(ca: str) -> ssl.SSLContext:
    _exists(ca)
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise FederationError(
            f"flower: {ca} holds no certificate in PEM form ({error.reason}). Give the ca.crt of the authority that "
            "signed the SuperLink's certificate."
        ) from error


def _exists(path: str) -> None:
    try:
        with open(path, "rb"):  # noqa: PTH123 (the message of the system names the file)
            pass
    except OSError as error:
        raise FederationError(f"flower: {path} cannot be read ({error.strerror}).") from error


def _reason(error: ssl.SSLCertVerificationError, host: str) -> str:
    if error.verify_code in (UNKNOWN_ISSUER, SELF_SIGNED):
        return "another authority signed the SuperLink's certificate. Give the ca.crt that belongs to it."
    if error.verify_code in (WRONG_NAME, WRONG_IP):
        return (
            f"the SuperLink's certificate is not for {host}. Sign one whose subjectAltName has "
            f"{'IP' if error.verify_code == WRONG_IP else 'DNS'}:{host}; the common name does not count."
        )
    if error.verify_code == EXPIRED:
        return "the SuperLink's certificate has expired. Sign a new one."
    return f"{error.verify_message}."


@click.command()
@click.argument("address", required=False)
@click.option("--ca", help="Certificate of the authority, as for --root-certificates.")
@click.option("--certificate", help="The SuperLink's certificate, as for --ssl-certfile.")
@click.option("--key", help="Its key, as for --ssl-keyfile.")
def main(address: str | None, ca: str | None, certificate: str | None, key: str | None) -> None:
    """Check that a SuperLink at HOST:PORT fits a CA, or that a certificate fits its key; exit with 2 if not."""
    if (address is None) != (ca is None) or (certificate is None) != (key is None) or (ca or key) is None:
        raise click.UsageError("give HOST:PORT with --ca, or --certificate with --key.")
    try:
        if certificate is not None and key is not None:
            click.echo(check_pair(certificate, key))
        if address is not None and ca is not None:
            click.echo(check_server(address, ca))
    except FederationError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
