"""A server of our own that listens elsewhere, with TLS."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.server.cli import main
from jupyter_llmcloud.server.headless.listener import Listener
from tests.server.test_cli import START_DEADLINE_S

pytest_plugins = ["tests.support.server_fixtures"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and localhost, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "locked.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.story
@pytest.mark.slow
def test_serve_answers_by_tls_to_who_knows_its_certificate_and_prints_what_to_paste(
    headless_root: Path, real_model: Path, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    certfile, keyfile = certificate
    command = [sys.executable, "-m", "jupyter_llmcloud.server.cli", "serve", str(real_model), "--name", "tiny"]
    beside = os.path.relpath(certfile)  # what is printed is pasted in another folder
    command += ["--certfile", beside, "--keyfile", str(keyfile)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LLMCLOUD_LEASE_S": "5"})
    watchdog = threading.Timer(START_DEADLINE_S, process.kill)
    watchdog.start()
    try:
        told = dict(process.stdout.readline().split() for _ in range(3))
        assert told["base_url"].startswith("https://127.0.0.1:")
        headers = {"Authorization": f"Bearer {told['api_key']}"}
        body = {"model": "tiny", "prompt": "The for", "max_tokens": 4}
        context = ssl.create_default_context(cafile=str(certfile))
        with httpx.Client(verify=context, trust_env=False, timeout=60) as client:
            answer = client.post(f"{told['base_url']}/completions", json=body, headers=headers)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        with pytest.raises(httpx.ConnectError), httpx.Client(trust_env=False) as client:
            client.get(f"{told['base_url']}/models", headers=headers)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)), httpx.Client(trust_env=False) as client:
            client.get(f"{told['base_url'].replace('https', 'http')}/models", headers=headers)
        lines = []
        while not lines or ".choices[0].text)" not in lines[-1]:
            lines.append(process.stdout.readline())
        curl, _, python = "".join(lines).strip().partition("\n\n")
        curl = curl.replace("curl ", "curl --silent --show-error --noproxy '*' ", 1)
        answered = subprocess.run(
            ["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )
        assert '"choices"' in answered.stdout, answered
        environment = {**os.environ, "NO_PROXY": "*"}
        subprocess.run([sys.executable, "-c", python], env=environment, timeout=60, check=True)
    finally:
        process.terminate()
        watchdog.cancel()
        process.wait(timeout=60)
        process.stdout.close()
    assert process.returncode == 0


def test_a_certificate_that_cannot_be_used_is_refused_before_anything_starts(
    headless_root: Path, certificate: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    certfile, keyfile = certificate
    (tmp_path / "text.pem").write_text("no certificate")
    for words, reason in (
        (["--certfile", "/no/such.pem"], "No such file"),
        (["--certfile", str(tmp_path / "text.pem")], "cannot be used"),
        (["--certfile", str(certfile), "--keyfile", str(certfile)], "cannot be used"),
        (["--certfile", str(certfile), "--keyfile", str(certfile.parent / "locked.pem")], "without a passphrase"),
        (["--keyfile", str(keyfile)], "--keyfile needs --certfile"),
    ):
        assert main(["serve", "/no/model", *words]) == 1
        said = capsys.readouterr().err
        assert said.startswith("UsageError: ") and reason in said and said.count("\n") == 1, said


def test_a_port_that_is_taken_or_an_address_that_is_none_is_said_in_one_line(
    headless_root: Path, capsys: pytest.CaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (["--port", port], ["--ip", "203.0.113.7"], ["--ip", "no such host"]):
            assert main(["serve", "/no/model", *words]) == 1
            said = capsys.readouterr().err
            assert said.startswith("UsageError: --ip ") and "nothing can listen there" in said and said.count("\n") == 1


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_a_port_that_there_is_not_is_refused(port: int) -> None:
    with pytest.raises(UsageError, match=r"0 \(any free one\) to 65535"):
        Listener(port).sockets()


@pytest.mark.parametrize(
    ("ip", "is_local", "host"),
    [
        ("127.0.0.1", True, "127.0.0.1"), ("localhost", True, "localhost"), ("::1", True, "[::1]"),
        ("0.0.0.0", False, "127.0.0.1"), ("::", False, "[::1]"), ("10.0.0.5", False, "10.0.0.5"),
    ],
)  # fmt: skip
def test_a_listener_knows_who_reaches_it_and_how_this_machine_does(ip: str, is_local: bool, host: str) -> None:
    listener = Listener(ip=ip)
    assert (listener.is_local, listener.host) == (is_local, host)


def test_nothing_but_loopback_is_listened_on_unless_asked() -> None:
    [listening] = Listener().sockets()
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    assert Listener().tls() is None
    with pytest.raises(UsageError):
        Listener(keyfile="x").tls()
