"""A small certificate authority for tests and closed fleets: ``memopt sync init-ca`` and ``issue``.

A node's name is a SPIFFE-like URI in its certificate's subject alternative name,
``spiffe://memopt/<node>``: apart from host names, so that no host name can pass for a node.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memopt.errors import ConfigurationError
from memopt.extras import require
from memopt.federation.failures import SyncFailure
from memopt.federation.trust.manifest import check_node
from memopt.federation.trust.signing import one_at_a_time
from memopt.files import atomic_path
from memopt.sealing import check_private, write_private

PREFIX = "spiffe://memopt/"
_WHY = "make certificates"


def init_ca(folder: str | Path, *, days: float = 3650, name: str = "memopt test authority") -> Path:
    """Make ``ca.pem`` and ``ca.key`` (ECDSA P-256) in ``folder`` and return the certificate's path.

    Raises:
        ConfigurationError: there is an authority already; it is never overwritten.
    """
    folder = Path(folder)
    certificate, key_file = folder / "ca.pem", folder / "ca.key"
    if key_file.exists():
        raise ConfigurationError(f"{key_file} exists already", fix="use it, or give a new folder")
    x509, ec, hashes = _modules()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    public = key.public_key()
    usage = _usage(x509, sign_certificates=True)
    built = (
        _builder(x509, subject, subject, public, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    # Of two at once one is refused here, before it writes a certificate.
    write_private(key_file, _pem_key(key), new=True)
    _write(certificate, built)
    return certificate


def issue(
    folder: str | Path,
    node: str,
    *,
    ca: str | Path,
    hosts: Sequence[str] = (),
    days: float = 90,
    starts: datetime.datetime | None = None,
) -> tuple[Path, Path]:
    """Issue ``<node>.pem`` and ``<node>.key`` in ``folder``; return both paths.

    Args:
        folder: where the two files go.
        node: the node's name; it goes into the certificate as ``spiffe://memopt/<node>``.
        ca: folder of ``ca.pem`` and ``ca.key``.
        hosts: DNS names and IP addresses. With any, the certificate may serve; without, it is a
            client's only and no server can be run with it.
        days: validity; negative makes an expired one, for tests.
        starts: begin of validity, now by default.
    """
    check_node(node)
    x509, ec, hashes = _modules()
    serialization = require(
        "cryptography.hazmat.primitives.serialization", extra="federation", why=_WHY
    )
    check_private(Path(ca) / "ca.key")
    try:
        authority = x509.load_pem_x509_certificate((Path(ca) / "ca.pem").read_bytes())
        signer = serialization.load_pem_private_key((Path(ca) / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"authority {ca} cannot be read ({error})", fix=f"run: memopt sync init-ca {ca}"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.UniformResourceIdentifier(PREFIX + node), *(_host(x509, h) for h in hosts)]
    purposes = [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    if hosts:
        purposes.append(x509.ExtendedKeyUsageOID.SERVER_AUTH)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, node[:64])])
    public = key.public_key()
    built = (
        _builder(x509, subject, authority.subject, public, days, starts)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(x509, sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    certificate, key_file = Path(folder) / f"{node}.pem", Path(folder) / f"{node}.key"
    # A key and its certificate go together.
    with one_at_a_time(Path(folder)):
        write_private(key_file, _pem_key(key))
        _write(certificate, built)
    return certificate, key_file


def node_of(certificate: Mapping[str, Any]) -> str:
    """Return the node a verified certificate names (the form of ``ssl.SSLSocket.getpeercert``).

    Raises:
        SyncFailure: it names none, or more than one.

    >>> node_of({"subjectAltName": (("DNS", "x"), ("URI", "spiffe://memopt/edge-1"))})
    'edge-1'
    """
    names = [
        value[len(PREFIX) :]
        for kind, value in certificate.get("subjectAltName", ())
        if kind == "URI" and value.startswith(PREFIX)
    ]
    if len(names) != 1:
        raise SyncFailure(
            "unauthenticated",
            f"the certificate names {len(names)} memopt nodes instead of one",
            fix="issue it with: memopt sync issue NODE",
        )
    return check_node(names[0])


def expired(certificate: Path) -> str:
    """Return why a PEM certificate is not valid now, nothing when it is."""
    x509 = _modules()[0]
    read = x509.load_pem_x509_certificate(certificate.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    if now > read.not_valid_after_utc:
        return f"our certificate {certificate} expired on {read.not_valid_after_utc:%Y-%m-%d %H:%M}"
    if now < read.not_valid_before_utc:
        return f"our certificate {certificate} is not valid yet"
    return ""


def _modules() -> tuple[Any, Any, Any]:
    return (
        require("cryptography.x509", extra="federation", why=_WHY),
        require("cryptography.hazmat.primitives.asymmetric.ec", extra="federation", why=_WHY),
        require("cryptography.hazmat.primitives.hashes", extra="federation", why=_WHY),
    )


def _builder(
    x509: Any,
    subject: Any,
    issuer: Any,
    public: Any,
    days: float,
    starts: datetime.datetime | None = None,
) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    # Begin an hour back for clocks that run behind; an expired one needs a begin before its end.
    begin = starts or now - datetime.timedelta(hours=1) + datetime.timedelta(days=min(days, 0) * 2)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(x509: Any, *, sign_certificates: bool) -> Any:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem_key(key: Any) -> bytes:
    serialization = require(
        "cryptography.hazmat.primitives.serialization", extra="federation", why=_WHY
    )
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem


def _write(path: Path, certificate: Any) -> None:
    serialization = require(
        "cryptography.hazmat.primitives.serialization", extra="federation", why=_WHY
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
