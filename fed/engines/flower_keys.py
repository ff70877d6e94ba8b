"""A certificate for a SuperLink on this machine, and keys for its nodes, good for one run."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sparsekit.fed.engines import framed

_DAYS = 30
_PEM, _PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


def make_keys(folder: Path, nodes: list[str]) -> None:
    """Write ca.crt, server.pem, server.key, and a private and a public key for every node."""
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    root = _certificate("sparsekit run", authority, None, authority)
    own = _certificate("sparsekit SuperLink", server, root, authority)
    (folder / "ca.crt").write_bytes(root.public_bytes(_PEM))
    (folder / "server.pem").write_bytes(own.public_bytes(_PEM))
    _write_private(folder / "server.key", server, serialization.PrivateFormat.PKCS8)
    for node in nodes:
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(folder / node, key, serialization.PrivateFormat.OpenSSH)
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        (folder / f"{node}.pub").write_bytes(public)


def _write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    path.touch(0o600)
    path.write_bytes(key.private_bytes(_PEM, form, _PLAIN))


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    signer: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    here = [x509.IPAddress(ipaddress.ip_address(framed.HOST)), x509.DNSName("localhost")]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(here), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
