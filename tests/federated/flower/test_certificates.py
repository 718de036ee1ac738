import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from mergesolve.federated import FederationError
from mergesolve.federated.flower.certificates import check_pair, check_server, main

SCRIPT = Path(__file__).parents[3] / "docs/examples/flower/certificates.sh"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The certificates that the example makes, and those of a stranger."""
    folders = []
    for name in ("ours", "stranger"):
        folder = tmp_path_factory.mktemp(name)
        subprocess.run(["bash", str(SCRIPT), str(folder)], check=True, capture_output=True)
        folders.append(folder)
    return folders


@pytest.fixture
def server(keys):
    """Ports of a TLS server with our certificate, and of one that speaks no TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys[0] / "server.crt", keys[0] / "server.key")
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]

    def serve(listener, secure):
        try:
            connection, _ = listener.accept()
            with connection:
                if secure:
                    context.wrap_socket(connection, server_side=True).close()
                else:
                    connection.recv(1024)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        except OSError:
            pass

    threads = [
        threading.Thread(target=serve, args=(listener, secure), daemon=True)
        for listener, secure in zip(listeners, (True, False), strict=True)
    ]
    for thread in threads:
        thread.start()
    yield [listener.getsockname()[1] for listener in listeners]
    for listener, thread in zip(listeners, threads, strict=True):
        # A thread that waits in accept() is woken by a connection, not by closing the socket.
        with socket.create_connection(listener.getsockname()):
            pass
        listener.close()
        thread.join(5)


def test_the_example_certificates_fit_each_other_and_the_loopback_address(keys, server):
    assert "vouches for" in check_server(f"127.0.0.1:{server[0]}", str(keys[0] / "ca.crt"))
    assert "is the key of" in check_pair(str(keys[0] / "server.crt"), str(keys[0] / "server.key"))


def test_a_certificate_of_another_authority_is_said_to_be_so(keys, server):
    with pytest.raises(FederationError, match="another authority signed"):
        check_server(f"127.0.0.1:{server[0]}", str(keys[1] / "ca.crt"))


@contextlib.contextmanager
def tls_server(host, certificate, key):
    """A server for one handshake; gives its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            context.wrap_socket(connection, server_side=True)

    with socket.create_server((host, 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{host}:{listener.getsockname()[1]}"
        thread.join(5)


def test_a_certificate_for_another_address_names_the_entry_that_it_lacks(keys):
    with (
        tls_server("127.0.0.2", keys[0] / "server.crt", keys[0] / "server.key") as address,
        pytest.raises(FederationError, match=r"subjectAltName has IP:127\.0\.0\.2"),
    ):
        check_server(address, str(keys[0] / "ca.crt"))


def test_an_expired_certificate_is_said_to_be_so(keys, tmp_path):
    ours, old = keys[0], tmp_path / "old.crt"
    ask = ["openssl", "req", "-new", "-key", ours / "server.key", "-subj", "/CN=localhost", "-out", tmp_path / "r.csr"]
    subprocess.run(ask, check=True, capture_output=True)
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    sign = ["openssl", "x509", "-req", "-in", tmp_path / "r.csr", "-CA", ours / "ca.crt", "-CAkey", ours / "ca.key"]
    sign += ["-extfile", tmp_path / "names", "-CAserial", tmp_path / "serial", "-CAcreateserial"]
    signed = subprocess.run([*sign, "-days", "-1", "-out", old], check=False, capture_output=True)
    if signed.returncode != 0:
        pytest.skip("this openssl signs nothing that has expired")
    with tls_server("127.0.0.1", old, ours / "server.key") as address, pytest.raises(FederationError, match="expired"):
        check_server(address, str(ours / "ca.crt"))


def test_a_server_without_tls_is_told_from_a_wrong_certificate(keys, server):
    with pytest.raises(FederationError, match="does not speak TLS"):
        check_server(f"127.0.0.1:{server[1]}", str(keys[0] / "ca.crt"))


def test_nothing_at_the_address_is_said_to_be_so(keys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(FederationError, match="nothing answers"):
        check_server(f"127.0.0.1:{port}", str(keys[0] / "ca.crt"))


def test_files_that_are_swapped_missing_or_of_another_pair_are_named(keys):
    ours, stranger = ({n: str(folder / n) for n in ("ca.crt", "server.crt", "server.key")} for folder in keys)
    with pytest.raises(FederationError, match=r"server\.key do not fit: the key is of another"):
        check_pair(ours["server.crt"], stranger["server.key"])
    with pytest.raises(FederationError, match="no PEM file of its kind"):
        check_pair(ours["server.key"], ours["server.crt"])
    with pytest.raises(FederationError, match=r"server\.key holds no certificate"):
        check_server("127.0.0.1:1", ours["server.key"])
    with pytest.raises(FederationError, match=r"absent\.crt cannot be read"):
        check_server("127.0.0.1:1", "absent.crt")


def test_the_command_exits_with_2_and_one_line(keys):
    result = CliRunner().invoke(
        main, ["--certificate", str(keys[0] / "server.crt"), "--key", str(keys[1] / "server.key")]
    )
    assert result.exit_code == 2
    assert result.output.startswith("error: flower: ")
    assert result.output.count("\n") == 1
    assert CliRunner().invoke(main, []).exit_code == 2
