"""``memopt memory rekey``: seal an encrypted store under a new key."""

from __future__ import annotations

import json

from memopt.commands.console import echo, stdout
from memopt.commands.memory.options import AsJson, Key, Store
from memopt.commands.memory.shared import open_store
from memopt.errors import ConfigurationError


def rekey(store: Store, key: Key = None, as_json: AsJson = False) -> None:
    """Seal every memory under the first key given; the present key comes after it.

    The key file, or MEMOPT_MEMORY_KEY, holds both: the new one first, one a line or separated by
    commas. Resumable. Afterwards only the new one is needed, and what the old one sealed is erased.
    """
    from memopt.memory.privacy.erase import erase
    from memopt.memory.privacy.keys import read_cipher, rotate

    cipher = read_cipher(key)
    if cipher is None or len(cipher.keys) < 2:
        raise ConfigurationError(
            "rekey needs two keys", fix="write the new key first and the present one after it"
        )
    with open_store(store, embed=False, key=key) as here:
        count = rotate(here.store, cipher)
        erase(here.store)
    if as_json:
        echo(json.dumps({"memories": count, "key_id": cipher.key_id}))
        return
    stdout().print(f"{count} memories sealed under key {cipher.key_id}")
