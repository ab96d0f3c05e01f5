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

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from memopt.errors import ConfigurationError
from memopt.federation.failures import SyncFailure
from memopt.federation.trust.manifest import check_node
from memopt.federation.trust.signing import one_at_a_time, pem_of
from memopt.files import atomic_path
from memopt.sealing import check_private, write_private

PREFIX = "spiffe://memopt/"


def init_ca(folder: str | Path, *, days: float = 3650, name: str = "memopt test authority") -> Path:
    """Make ``ca.pem`` and ``ca.key`` (ECDSA P-256) in ``folder`` and return the certificate's path.

    Raises:
        ConfigurationError: there is an authority already; it is never overwritten.
    """
    folder = Path(folder)
    certificate, key_file = folder / "ca.pem", folder / "ca.key"
    if key_file.exists():
        raise ConfigurationError(f"{key_file} exists already", fix="use it, or give a new folder")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(name)
    built = (
        _builder(subject, subject, key.public_key(), days, ca=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    # Of two at once one is refused here, before it writes a certificate.
    write_private(key_file, pem_of(key), new=True)
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
    authority, signer = _authority(Path(ca))
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.UniformResourceIdentifier(PREFIX + node), *map(_host, hosts)]
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if hosts:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    built = (
        _builder(_common_name(node[:64]), authority.subject, key.public_key(), days, starts)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .sign(signer, hashes.SHA256())
    )
    certificate, key_file = Path(folder) / f"{node}.pem", Path(folder) / f"{node}.key"
    # A key and its certificate go together.
    with one_at_a_time(Path(folder)):
        write_private(key_file, pem_of(key))
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
    read = x509.load_pem_x509_certificate(certificate.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    if now > read.not_valid_after_utc:
        return f"our certificate {certificate} expired on {read.not_valid_after_utc:%Y-%m-%d %H:%M}"
    if now < read.not_valid_before_utc:
        return f"our certificate {certificate} is not valid yet"
    return ""


def _authority(folder: Path) -> tuple[Any, Any]:
    check_private(folder / "ca.key")
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"authority {folder} cannot be read ({error})", fix=f"run: memopt sync init-ca {folder}"
        ) from error
    return certificate, key


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: float,
    starts: datetime.datetime | None = None,
    *,
    ca: bool = False,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    # Begin an hour back for clocks that run behind; an expired one needs a begin before its end.
    begin = starts or now - datetime.timedelta(hours=1) + datetime.timedelta(days=min(days, 0) * 2)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, certificate: x509.Certificate) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
