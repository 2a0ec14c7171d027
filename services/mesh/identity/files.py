"""How certificates lie on disk for Envoy: per account a folder, in it `sds.json`, which never changes, and `current`.

`current` is a symbolic link to the folder of the newest certificate and is replaced by rename. Envoy watches for that;
it does not notice files rewritten in place, and of two files renamed one after the other it would read a mixed pair.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from services.mesh.identity.authority import Certificate, write_private
from services.mesh.rundir import write_atomically
from services.mesh.translate.names import TYPE_URL, Json
from services.mesh.translate.tls import CERTIFICATE, ROOT, ROOT_FOLDER, SDS_FILE

CURRENT = "current"
CHAIN_FILE, KEY_FILE, ROOT_FILE = "chain.pem", "key.pem", "root.pem"


def write_root(folder: Path, root: bytes) -> None:
    """What every member trusts."""
    home = folder / ROOT_FOLDER
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / ROOT_FILE, root.decode())
    context = {"trusted_ca": {"filename": str(home / ROOT_FILE)}, **_watched(home)}
    _write_secret(home, {"name": ROOT, "validation_context": context})


def write_certificate(folder: Path, account: str, certificate: Certificate) -> None:
    """Makes `certificate` the account's newest; the first time also what tells Envoy where to look.

    The one before stays until the next: Envoy may just be reading it.
    """
    home = folder / account
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    version = home / certificate.serial
    version.mkdir(mode=0o700)
    (version / CHAIN_FILE).write_bytes(certificate.chain)
    write_private(version / KEY_FILE, certificate.key)
    before = os.readlink(home / CURRENT) if (home / CURRENT).is_symlink() else ""
    draft = home / f".{CURRENT}.{os.getpid()}"
    draft.unlink(missing_ok=True)
    draft.symlink_to(version.name)
    draft.replace(home / CURRENT)
    _write_secret(
        home,
        {
            "name": CERTIFICATE,
            "tls_certificate": {
                "certificate_chain": {"filename": str(home / CURRENT / CHAIN_FILE)},
                "private_key": {"filename": str(home / CURRENT / KEY_FILE)},
                **_watched(home),
            },
        },
    )
    for other in home.iterdir():
        if other.is_dir() and not other.is_symlink() and other.name not in (version.name, before):
            shutil.rmtree(other, ignore_errors=True)


def _watched(home: Path) -> Json:
    return {"watched_directory": {"path": str(home)}}


def _write_secret(home: Path, secret: Json) -> None:
    """Only where it is new: a needless rename would make Envoy read everything once more."""
    resource = {"@type": TYPE_URL + "envoy.extensions.transport_sockets.tls.v3.Secret", **secret}
    text = json.dumps({"resources": [resource]}, sort_keys=True, indent=1) + "\n"
    path = home / SDS_FILE
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
