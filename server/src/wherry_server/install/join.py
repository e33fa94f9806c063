"""Makes this machine a Wherry device: what the line of `wherry device invite` runs. Needs Python and its venv module only.

Trust comes with the line, which a person pasted: the digest of this file, the digest of the authority that signs for the
server, and, in the token, the digest of the root of trust of models. Nothing that the network says is believed without. The token
comes by standard input, and goes on so: a list of processes shows what a command was told. Python runs isolated (-I): this file lies in a folder
where others may put modules.
"""

import argparse
import hashlib
import json
import os
import platform
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import NoReturn

PYTHON_MIN = (3, 11)
BYTES_MAX = 64 * 1024 * 1024
WAIT_S = 60
BY_INPUT = "-"
TOKEN_CHARS_MAX = 4096
HOST_CHARS_MAX = 57
"""Of a name, which has 64 with what is put behind it."""
SYSTEMD = Path("/run/systemd/system")
"""There while systemd runs."""
NAME = re.compile(r"[A-Za-z0-9_.+!-]{1,200}\.whl")


def main() -> None:
    """Do it all, or say what is missing."""
    chosen = arguments()
    if os.geteuid() != 0 and chosen.service:
        sudo = shutil.which("sudo")
        if sudo is None:
            fail("this has to run as root", "log in as root and paste the line again")
        os.execv(sudo, [sudo, sys.executable, "-I", *sys.argv])
    check_python()
    authority = fetch_authority(chosen.server, chosen.ca)
    with tempfile.TemporaryDirectory(prefix="wherry-join-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the agent's user reads the authority's certificate here
        ca = folder / "ca.pem"
        ca.write_text(authority)
        context = ssl.create_default_context(cadata=authority)
        agent = install(chosen, folder, wheels(chosen.server, context, folder))
        home = Path(chosen.home)
        prepare(home, chosen)
        as_user = ["runuser", "-u", chosen.user, "--"] if chosen.service else []
        labels = [word for label in chosen.label for word in ("--label", label)]
        given = ["--server", chosen.server, "--token", BY_INPUT, "--name", chosen.name, "--ca", str(ca), *labels]
        pasted = sys.stdin.readline(TOKEN_CHARS_MAX) if chosen.token == BY_INPUT else chosen.token
        run(
            [*as_user, str(agent), "enrol", "--home", str(home), *given],
            "the device did not enrol",
            f"{pasted.strip()}\n",
        )
    unit(chosen, agent, home)


def arguments() -> argparse.Namespace:
    """Read the line."""
    parser = argparse.ArgumentParser(description="Make this machine a Wherry device.")
    parser.add_argument("server", help="https://ADDRESS:PORT")
    parser.add_argument("--ca", required=True, help="SHA-256 of the authority's certificate")
    parser.add_argument("--token", required=True, help="enrolment token; - reads it from standard input")
    parser.add_argument("--name", default="", help="of the device (its host name)")
    parser.add_argument("--many", action="store_true", help="add something of this machine to its name")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--engine", choices=["auto", "onnx", "litert", "tflite", "none"], default="auto")
    parser.add_argument("--prefix", default="/opt/wherry", help="where the environment goes")
    parser.add_argument("--home", default="/var/lib/wherry", help="where the device keeps what it has")
    parser.add_argument("--units", default="/etc/systemd/system", help="where the systemd unit goes")
    parser.add_argument("--user", default="wherry", help="system user of the agent")
    parser.add_argument("--no-index", action="store_true", help="install only wheels that the server gives")
    parser.add_argument("--no-service", dest="service", action="store_false", help="no user, no unit, no root")
    chosen = parser.parse_args()
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().split(".")[0]).strip("-") or "device"
    if not chosen.name:
        chosen.name = f"{host[:HOST_CHARS_MAX].rstrip('-')}-{machine()}" if chosen.many else host
    return chosen


def machine() -> str:
    """Return six digits that stay with this machine."""
    for place in ("/sys/firmware/devicetree/base/serial-number", "/etc/machine-id"):
        try:
            found = Path(place).read_bytes().strip(b"\0\n ")
        except OSError:
            continue
        if found:
            return hashlib.sha256(found).hexdigest()[:6]
    return os.urandom(3).hex()


def check_python() -> None:
    """See that there is a Python that the agent runs on, with venv."""
    if sys.version_info < PYTHON_MIN:
        found = platform.python_version()
        fail(f"Python {found} is too old", "use Raspberry Pi OS 12 (bookworm) or later: Python 3.11")
    try:
        import ensurepip  # noqa: F401  # whether it is there
        import venv  # noqa: F401
    except ImportError:
        fail("Python's venv is not installed", "apt install python3-venv")


def fetch_authority(server: str, digest: str) -> str:
    """Fetch the certificate of the authority, from whoever answers, and see that it is the one of the line."""
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    pem = fetch(f"{server}/install/ca.pem", anybody).decode("ascii", "replace")
    try:
        certificate = ssl.PEM_cert_to_DER_cert(pem)
        found = hashlib.sha256(certificate).hexdigest()
    except ValueError:
        certificate, found = b"", "no certificate"
    if found != digest:
        fail(
            f"{server} shows the authority {found}, the line names {digest}",
            "make a new line on the server that you mean; somebody may be in between",
        )
    return ssl.DER_cert_to_PEM_cert(certificate)  # and nothing that was sent behind it


def wheels(server: str, context: ssl.SSLContext, folder: Path) -> list[str]:
    """Fetch the wheels that the server gives; return their names, its own first."""
    listed = json.loads(fetch(f"{server}/install/wheels.json", context))
    for name, digest in listed.items():
        if not NAME.fullmatch(name):
            fail(f"the server offers a file named {name!r}", "see what runs there")
        data = fetch(f"{server}/install/wheels/{name}", context)
        if hashlib.sha256(data).hexdigest() != digest:
            fail(f"{name} is not what the server listed", "try again")
        (folder / name).write_bytes(data)
    return list(listed)


def install(chosen: argparse.Namespace, folder: Path, listed: list[str]) -> Path:
    """Make the environment; return the agent's program.

    The members are named by their files: by name, pip would take a higher version from whoever has one in the package index.
    """
    own = {}
    for member in ("wherry_agent", "wherry_shared"):
        own[member] = next((str(folder / name) for name in listed if name.startswith(f"{member}-")), "")
        if not own[member]:
            fail(f"{chosen.server} gives no wheel of {member}", "see what runs there")
    prefix = Path(chosen.prefix)
    python = prefix / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(prefix)], "no environment was made")
    engine = pick_engine() if chosen.engine == "auto" else chosen.engine
    extra = "" if engine == "none" else f"[{engine}]"
    print(f"Installing wherry-agent{extra} into {prefix}", flush=True)
    index = ["--no-index"] if chosen.no_index else []
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    what = [own["wherry_agent"] + extra, own["wherry_shared"]]
    run([*pip, *index, "--find-links", str(folder), *what], "the agent was not installed")
    return prefix / "bin" / "wherry-agent"


def pick_engine() -> str:
    """Return the engine for which there are wheels for this machine."""
    wide = sys.maxsize > 2**32
    if wide and platform.machine() in ("aarch64", "x86_64"):
        return "onnx"
    if platform.machine() in ("armv7l", "aarch64") and sys.version_info < (3, 12):
        return "tflite"
    print("No engine has wheels for this machine: the agent runs and reports, and serves nothing.", flush=True)
    return "none"


def prepare(home: Path, chosen: argparse.Namespace) -> None:
    """Make the user and the folder."""
    home.mkdir(parents=True, exist_ok=True)
    if not chosen.service:
        return
    try:
        known = pwd.getpwnam(chosen.user)
    except KeyError:
        made = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", chosen.user]
        run(made, f"user {chosen.user} was not made")
        known = pwd.getpwnam(chosen.user)
    os.chown(home, known.pw_uid, known.pw_gid)
    home.chmod(0o710)


def unit(chosen: argparse.Namespace, agent: Path, home: Path) -> None:
    """Install the systemd unit and start it, where systemd runs."""
    start = f"{agent} run --home {home}"
    if not chosen.service:
        print(f"Enrolled as {chosen.name}. Start it: {start}", flush=True)
        return
    made = subprocess.run([str(agent), "unit", "--home", str(home)], check=True, capture_output=True, text=True)
    text = made.stdout.replace("User=wherry\n", f"User={chosen.user}\n").replace(
        "Group=wherry\n", f"Group={chosen.user}\n"
    )
    path = Path(chosen.units) / "wherry-agent.service"
    path.write_text(text)
    if SYSTEMD.is_dir():
        run(["systemctl", "daemon-reload"], "systemd did not read the unit")
        run(["systemctl", "enable", "--now", "wherry-agent"], "the agent was not started")
        print(f"{chosen.name} runs: systemctl status wherry-agent", flush=True)
    else:
        print(f"Enrolled as {chosen.name}; {path} is written, but systemd does not run here: {start}", flush=True)


def fetch(url: str, context: ssl.SSLContext) -> bytes:
    """Return what an address answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with direct.open(url, timeout=WAIT_S) as answer:
            data: bytes = answer.read(BYTES_MAX + 1)
    except OSError as error:
        fail(f"{url}: {error}", "check the address and the network")
    if len(data) > BYTES_MAX:
        fail(f"{url} is larger than {BYTES_MAX} bytes", "see what runs there")
    return data


def run(command: list[str], consequence: str, said: str = "") -> None:
    """Run a program, which reads what is said to it; end with its failure."""
    if subprocess.run(command, check=False, cwd="/", input=said, text=True).returncode:
        fail(f"failed: {' '.join(command[:4])} …", f"{consequence}; see above, and paste the line again")


def fail(why: str, step: str) -> NoReturn:
    """End with a reason and the next step."""
    print(f"error: {why}\n  next: {step}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
