"""Keys that people hold: in encrypted files, and in a security module, where softhsm2 stands for one."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signer

from tests.services import needs
from wherry_server.ceremony import Ceremony
from wherry_server.trust import Trust
from wherry_shared import key_files, key_holders
from wherry_shared.errors import DeviceError, RefusedError
from wherry_shared.key_holders import make_in_module, open_key, using

LIBRARIES = (
    Path("/usr/lib/softhsm/libsofthsm2.so"),
    Path("/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"),
    Path("/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so"),
)
PIN = "hunter22"


def refused(place: str) -> str:
    with pytest.raises(RefusedError) as caught:
        open_key(place)
    return caught.value.code


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token of softhsm2 with a PIN and no key."""
    needs("softhsm2-util")
    (tmp_path / "tokens").mkdir()
    conf = tmp_path / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(conf))
    monkeypatch.setenv(key_holders.MODULE_VARIABLE, str(next(path for path in LIBRARIES if path.exists())))
    monkeypatch.setenv(key_files.PASSWORD_VARIABLE, PIN)
    name = tmp_path.name[-30:]  # the module reads its tokens once in a process
    command = ["softhsm2-util", "--init-token", "--free", "--label", name, "--so-pin", "officer1", "--pin", PIN]
    subprocess.run(command, check=True, capture_output=True)
    return name


def test_a_key_file_opens_with_its_password_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "alice.pem"
    made = key_files.create(path, "correct horse")
    assert b"ENCRYPTED" in path.read_bytes()
    monkeypatch.delenv(key_files.PASSWORD_FILE_VARIABLE, raising=False)
    monkeypatch.setenv(key_files.PASSWORD_VARIABLE, "correct horse")
    assert open_key(str(path)).public_key == made.public_key
    monkeypatch.setenv(key_files.PASSWORD_VARIABLE, "wrong horse")
    assert refused(str(path)) == "password_wrong"
    monkeypatch.delenv(key_files.PASSWORD_VARIABLE)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115, PTH123  # nobody types
    assert refused(str(path)) == "password_missing"
    (tmp_path / "word").write_text("correct horse\n")
    monkeypatch.setenv(key_files.PASSWORD_FILE_VARIABLE, str(tmp_path / "word"))
    assert open_key(str(path)).public_key == made.public_key
    assert refused(str(tmp_path / "absent.pem")) == "key_absent"
    monkeypatch.setenv(key_files.PASSWORD_VARIABLE, "short")
    with pytest.raises(RefusedError, match="8 characters"):
        key_files.password_of("a key", fresh=True)


def test_a_key_in_a_module_signs_a_root_that_devices_take(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = f"pkcs11:{token}/7"
    assert refused(place) == "key_absent"
    made = make_in_module(place)
    assert make_in_module(place).public_key == made.public_key, "a key that is there is left alone"
    others: list[Signer] = [key_files.create(tmp_path / f"{name}.pem") for name in ("bob", "carol")]
    online: dict[str, Key] = {
        role: key_files.parse_public(pem) for role, pem in Trust.online_keys(tmp_path / "trust").items()
    }
    held, now = Ceremony(tmp_path / "ceremony"), datetime.now(UTC)
    holders = [key_files.parse_public(key_files.public_pem(signer)) for signer in (made, *others)]
    held.begin(holders, 2, online, now)
    for signer in (open_key(place), others[0]):
        with using(signer):
            assert held.sign(signer, now) == ["root", "targets"]
    trust = Trust.found(tmp_path / "trust", *held.whole(now))
    assert trust.public_state()["roles"]["root"]["threshold"] == 2
    with using(made):
        signature = made.sign(b"this")
    holders[0].verify_signature(signature, b"this")
    with pytest.raises(UnverifiedSignatureError):
        holders[0].verify_signature(signature, b"that")
    monkeypatch.setenv(key_files.PASSWORD_VARIABLE, "wrong pin")
    with pytest.raises(RefusedError) as caught, using(made):
        made.sign(b"this")
    assert caught.value.code == "password_wrong"


def test_a_module_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("PYKCS11LIB", raising=False)
    monkeypatch.delenv(key_holders.MODULE_VARIABLE, raising=False)
    assert refused("pkcs11:nowhere") == "module_missing"
    assert refused("pkcs11:") == "key_invalid"
    assert refused("pkcs11:token/seven") == "key_invalid"
    monkeypatch.setenv(key_holders.MODULE_VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises((DeviceError, RefusedError)) as caught:
        open_key("pkcs11:token")
    assert caught.value.code in {"module_failed", "key_absent"}
