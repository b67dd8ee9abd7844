"""Keys that sign (Ed25519), in PEM, and what they have signed. Needs cryptography, the extra `audit`."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from fsu_ray.errors import AlreadyExists, InvalidConfig, UserError


def keygen(file: Path) -> str:
    """Make a private key that only its owner may read; the public key, in PEM. Never overwrites."""
    serialization, ed25519 = _cryptography()
    private = ed25519.Ed25519PrivateKey.generate()
    text = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"{file} exists already; a key is never overwritten") from None
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); give another --out") from error
    with os.fdopen(descriptor, "wb") as sink:
        sink.write(text)
    return _pem(private.public_key())


def read_private(file: Path) -> Any:
    """The private key in a file; raises UserError."""
    serialization, ed25519 = _cryptography()
    key = _read(file, lambda text: serialization.load_pem_private_key(text, None))
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UserError(f"{file} is no Ed25519 private key in PEM; `fsu audit keygen` makes one")
    return key


def read_public(file: Path) -> Any:
    """The public key in a file; raises UserError."""
    serialization, ed25519 = _cryptography()
    key = _read(file, serialization.load_pem_public_key)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UserError(f"{file} is no Ed25519 public key in PEM; `fsu audit keygen` prints one")
    return key


def sign(private: Any, text: bytes) -> dict[str, str]:
    """The signature of `text`, with the public key that it is checked by."""
    signature = base64.b64encode(private.sign(text)).decode()
    return {"algorithm": "Ed25519", "public_key": _pem(private.public_key()), "signature": signature}


def check(signature: Any, text: bytes, trusted: Any = None) -> str | None:
    """What is wrong with what `sign` made of `text`, in words; None where it is good, and by the key `trusted`."""
    serialization, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        key = serialization.load_pem_public_key(signature["public_key"].encode())
        key.verify(base64.b64decode(signature["signature"], validate=True), text)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, KeyError, TypeError, AttributeError):
        return "not what was signed"
    return None if trusted is None or _pem(key) == _pem(trusted) else "signed with another key than the one given"


def _read(file: Path, load: Any) -> Any:
    """What `load` makes of a file, None where it is no key."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(file.read_bytes())
    except OSError as error:
        raise UserError(f"key {file} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def _pem(public: Any) -> str:
    serialization, _ = _cryptography()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(public.public_bytes(serialization.Encoding.PEM, form).decode())


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise InvalidConfig("keys and signatures need cryptography: pip install 'fsu_ray[audit]'") from None
    return serialization, ed25519
