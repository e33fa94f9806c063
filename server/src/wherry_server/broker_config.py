"""mosquitto in production form: everything that it reads, written into one folder.

Devices come to a listener that asks for a certificate of the device authority. The certificate's name is their user name
and, whatever they claim, their client id; two lines of access rules, the same for any number of devices, let each read
what is below its own name and write its own reports. The roles of the server come to another listener, with certificates
of another authority. mosquitto grants any subscription and holds back what the rules forbid at delivery.

mosquitto that root starts becomes another user before it reads its key, and reads all of this again as that user whenever the
list of revoked certificates changes. So the key, and the folder that it writes to, are given to that user where root writes the
configuration, and that it can read them is tried.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from wherry_server.identity import DeviceAuthority, ServersAuthority
from wherry_server.secret_files import write_secret
from wherry_server.settings import Settings
from wherry_shared.errors import DeviceError
from wherry_shared.limits import MQTT_PAYLOAD_BYTES_MAX

CONFIGURATION = "mosquitto.conf"
ACCESS = "access"
SERVER_ACCESS = "access-of-servers"
REVOKED = "revoked.pem"
STORE = "store"
"""The only folder that mosquitto writes to."""
PID = f"{STORE}/mosquitto.pid"
PID_BEFORE = "mosquitto.pid"
"""Where configurations of earlier releases have it."""
KEY = "broker.key"
CERTIFICATE_DAYS = 365
"""Life of what the broker shows; `wherry broker config` again makes another."""
SERVER_USER = "wherry-server"
IN_FLIGHT_MAX = 1000
QUEUED_MAX = 100_000
QUEUED_BYTES_MAX = 256 * 1024 * 1024
"""For one subscriber that is slow or away: ingest, that is, since devices keep no session."""
AUTOSAVE_S = 30
KEEPALIVE_S_MAX = 300
PACKET_BYTES_MAX = MQTT_PAYLOAD_BYTES_MAX + 1024
"""The largest payload, and room for its topic."""

RULES = """\
# Everybody: %u is the name in the certificate. The second level of what a device writes is the shard of its id, which ingest checks.
pattern read w1/%u/offer
pattern read w1/%u/ack
pattern write w1/+/%u/report
pattern write w1/+/%u/telemetry
pattern write w1/+/%u/hello
"""

SERVER_RULES = f"""\
user {SERVER_USER}
topic write w1/+/offer
topic write w1/+/ack
topic readwrite w1/+/+/report
topic readwrite w1/+/+/telemetry
topic readwrite w1/+/+/hello
"""


def configuration(settings: Settings, folder: Path, *, user: str, listen: str) -> str:
    """Return the configuration file.

    Args:
        settings: ports of both listeners, and where the roles' one listens.
        folder: where the other files are.
        user: to whom mosquitto changes when root starts it.
        listen: address on which devices are heard; empty for all.
    """
    return f"""\
# Written by `wherry broker config`; written again it is replaced. Needs mosquitto 2.0 or later.
user {user}
pid_file {folder / PID}
per_listener_settings true
persistence true
persistence_location {folder / STORE}/
autosave_interval {AUTOSAVE_S}
set_tcp_nodelay true
max_inflight_messages {IN_FLIGHT_MAX}
max_queued_messages {QUEUED_MAX}
max_queued_bytes {QUEUED_BYTES_MAX}
message_size_limit {MQTT_PAYLOAD_BYTES_MAX}
max_packet_size {PACKET_BYTES_MAX}
max_keepalive {KEEPALIVE_S_MAX}
log_dest stderr
log_type error
log_type warning
log_type notice

# devices
listener {settings.broker_port}{f" {listen}" if listen else ""}
allow_anonymous false
allow_zero_length_clientid false
max_qos 1
max_topic_alias 0
tls_version tlsv1.2
cafile {folder / "devices-ca.pem"}
certfile {folder / "broker.pem"}
keyfile {folder / "broker.key"}
crlfile {folder / REVOKED}
require_certificate true
use_identity_as_username true
use_username_as_clientid true
acl_file {folder / ACCESS}

# director, ingest
listener {settings.broker_server_port} {settings.broker_server_host}
allow_anonymous false
allow_zero_length_clientid false
tls_version tlsv1.2
cafile {folder / "servers-ca.pem"}
certfile {folder / "broker.pem"}
keyfile {folder / "broker.key"}
require_certificate true
use_identity_as_username true
acl_file {folder / SERVER_ACCESS}
"""


def write(
    settings: Settings,
    authority: DeviceAuthority,
    revoked: bytes,
    *,
    folder: Path | None = None,
    hosts: Sequence[str] = (),
    user: str = "mosquitto",
    listen: str = "",
) -> Path:
    """Write all files and return the path of the configuration.

    Raises:
        DeviceError: `broker_folder_closed`, the user could not read it.

    Args:
        settings: of the server.
        authority: signs what the broker shows.
        revoked: list of revoked certificates, PEM.
        folder: where to; by default where the settings have it.
        hosts: names and addresses under which devices find the broker, beside `broker_host`.
        user: to whom mosquitto changes when root starts it.
        listen: address on which devices are heard; empty for all.
    """
    folder = (folder or settings.broker_folder).absolute()
    (folder / STORE).mkdir(parents=True, exist_ok=True)
    known = dict.fromkeys([settings.broker_host, settings.broker_server_host, "127.0.0.1", "localhost", *hosts])
    pair = authority.issue_server(list(known), days=CERTIFICATE_DAYS)
    write_secret(folder / KEY, pair.key)
    for name, content in (
        ("broker.pem", pair.certificate),
        ("devices-ca.pem", authority.ca_pem.encode()),
        ("servers-ca.pem", ServersAuthority.ensure(settings.keys_folder).ca_pem.encode()),
        (REVOKED, revoked),
        (ACCESS, RULES.encode()),
        (SERVER_ACCESS, SERVER_RULES.encode()),
        (CONFIGURATION, configuration(settings, folder, user=user, listen=listen).encode()),
    ):
        replace(folder / name, content)
    _give(folder, user)
    return folder / CONFIGURATION


def to_be_given(folder: Path, user: str) -> list[Path]:
    """Return what is not yet of the user as whom mosquitto runs when root starts it; all of it if that user is not known here."""
    mine = folder / KEY, folder / STORE
    try:
        number = pwd.getpwnam(user).pw_uid
    except KeyError:
        return list(mine)
    return [path for path in mine if path.stat().st_uid != number]


def _give(folder: Path, user: str) -> None:
    if os.geteuid() != 0:
        return  # nothing can be given away: the caller says what root has to do
    try:
        whom = pwd.getpwnam(user)
    except KeyError:
        return
    for path in (folder / KEY, folder / STORE, *(folder / STORE).iterdir()):
        os.chown(path, whom.pw_uid, whom.pw_gid, follow_symlinks=False)
    tried = [str(folder / name) for name in (KEY, REVOKED, CONFIGURATION)]
    done = subprocess.run(
        ["/bin/sh", "-c", 'for file; do test -r "$file" || exit 1; done', "sh", *tried],
        check=False,
        cwd="/",
        user=whom.pw_uid,
        group=whom.pw_gid,
        extra_groups=[],
    )
    if done.returncode:
        raise DeviceError(
            "broker_folder_closed",
            f"{user}, as whom mosquitto runs, cannot read what is in {folder}",
            consequence="mosquitto would not start, or would never read a list of revoked certificates again",
            next_step=f"write it where {user} can read, as --output /etc/mosquitto/wherry, or name another user: --user",
        )


def program() -> str:
    """Return the path of mosquitto.

    Raises:
        DeviceError: `mosquitto_missing`.
    """
    found = shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    if found is None:
        raise DeviceError(
            "mosquitto_missing",
            "mosquitto is not installed, and the broker of wherry dev has no certificates and no access rules",
            consequence="nothing was started",
            next_step="install the Debian package mosquitto: apt install mosquitto",
        )
    return found


def become(settings: Settings) -> NoReturn:
    """Be the broker whose configuration is in the data folder."""
    os.execv(program(), [program(), "-c", str(settings.broker_folder / CONFIGURATION)])


def replace(path: Path, content: bytes) -> None:
    """Write a file that a broker of another user may read, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.chmod(0o644)
    part.replace(path)
