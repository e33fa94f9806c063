"""A device's certificate is renewed in time, whole or not at all, and the device goes on talking with the new one."""

from __future__ import annotations

import itertools
import json
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.agent.daemon_kit import agent, site
from tests.agent.serving_kit import until
from tests.tls_front import TlsFront, server_certificate, use_tls
from tests.trust_kit import RunningServer, running_server
from wherry_agent import identity, status
from wherry_agent.children import CourierAnswer, Enrol, Enrolled, Failed, Renew, Renewed, Reseal, Resealed
from wherry_agent.courier import run
from wherry_agent.disk import Disk
from wherry_agent.identity import Identity
from wherry_agent.renewal import LOOK_EVERY_S, LOOK_FIRST_S, WAIT_MAX_S, WAIT_MIN_S, Around, Renewal, due_s
from wherry_agent.sealing import Seal
from wherry_server.identity import DeviceAuthority, Issued, Request
from wherry_shared import reasons
from wherry_shared.errors import DeviceError, RefusedError
from wherry_simulators.disk import Loss, Recorder, tries

US = 1_000_000
DAY_S = 86_400
TORN = 2
LIFE_S = 24
_names = itertools.count()


# --- the courier ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def home(server: RunningServer, tmp_path: Path) -> Path:
    made = tmp_path / "home"
    task = Enrol(home=str(made), server=server.url, token=server.enrolment_token, name=f"renews-{next(_names)}")
    assert isinstance(run(task, print), Enrolled)
    return made


def known(home: Path) -> Identity:
    found = identity.load(home)
    assert found is not None
    return found


def certificate_in_use(home: Path) -> x509.Certificate:
    """Read the pair that the identity names; it has to be one."""
    folder = identity.pair_folder(home, known(home))
    certificate = x509.load_pem_x509_certificate((folder / identity.CERTIFICATE_FILE).read_bytes())
    key = load_pem_private_key((folder / identity.KEY_FILE).read_bytes(), None)
    assert certificate.public_key() == key.public_key()
    return certificate


def validity(certificate: x509.Certificate) -> tuple[int, int]:
    return (
        int(certificate.not_valid_before_utc.timestamp()) * US,
        int(certificate.not_valid_after_utc.timestamp()) * US,
    )


def reason(answer: CourierAnswer) -> str:
    assert isinstance(answer, Failed), answer
    return answer.reason


def test_a_renewal_puts_a_new_pair_in_the_place_of_the_old(home: Path) -> None:
    first, before = certificate_in_use(home), known(home)
    assert (before.not_before, before.not_after) == validity(first)
    for _ in range(3):
        answer = run(Renew(home=str(home), server=""), print)
        now = certificate_in_use(home)
        assert isinstance(answer, Renewed)
        assert (answer.not_before, answer.not_after) == validity(now)
        assert now.subject == first.subject
        assert now.public_key() != first.public_key()
        after = known(home)
        changed = {name: getattr(before, name) for name in ("pair", "not_before", "not_after", "content_key")}
        assert msgspec.structs.replace(after, **changed) == before, "nothing else changes"
        assert (after.not_before, after.not_after) == validity(now)
    assert len(list((home / "identity").rglob("key.pem"))) == 2, "the one in use and the one before"
    for path in (home / "identity").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_an_identity_of_an_older_release_is_told_how_long_it_is_valid(home: Path) -> None:
    path = home / "identity" / "device.json"
    old = {k: v for k, v in json.loads(path.read_bytes()).items() if k not in ("pair", "not_before", "not_after")}
    path.write_text(json.dumps(old))
    assert known(home).not_after == 0
    bounds = validity(certificate_in_use(home))
    assert run(Renew(home=str(home), server="http://127.0.0.1:1", only_look=True), print) == Renewed(
        not_before=bounds[0], not_after=bounds[1]
    )


@pytest.mark.parametrize("name", ["..", "pair-", "pair-../x", "elsewhere"])
def test_an_identity_that_names_another_folder_is_not_believed(home: Path, name: str) -> None:
    for path in (home / "identity").glob("device*.json"):
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "pair": name}))
    assert reason(run(Renew(home=str(home), server=""), print)) == reasons.TRUST_INVALID


@pytest.mark.parametrize("altered", [b"", b"\0" * 400, b'{"format": 1}'])
def test_an_identity_that_the_disk_altered_is_read_from_its_copy(home: Path, altered: bytes) -> None:
    assert isinstance(run(Renew(home=str(home), server=""), print), Renewed)
    before = known(home)
    path = home / "identity" / identity.DEVICE_FILE
    path.write_bytes(altered)
    assert known(home) == before
    assert isinstance(run(Renew(home=str(home), server=""), print), Renewed)
    assert json.loads(path.read_bytes())["pair"] == known(home).pair != before.pair, "a renewal writes both anew"
    for one in (home / "identity").glob("device*.json"):
        one.write_bytes(altered)
    with pytest.raises(RefusedError, match="identity_invalid"):
        identity.load(home)
    (home / "identity" / identity.DEVICE_FILE).unlink()
    assert identity.load(home) is None, "who removes it wants to enrol again"


Issue = Callable[[DeviceAuthority, Request, str, str], Issued]


def _lies(folder: Path) -> dict[str, Issue]:
    DeviceAuthority.create(folder, "default")
    stranger = DeviceAuthority.open(folder, days=1)
    issue = DeviceAuthority.issue
    other = replace_key(ec.generate_private_key(ec.SECP256R1()))
    return {
        "another key": lambda self, request, device, project: issue(self, other(request), device, project),
        "another device": lambda self, request, _device, project: issue(self, request, "e" * 22, project),
        "another authority": lambda _self, request, device, project: issue(stranger, request, device, project),
        "no certificate": lambda *_: Issued(pem="no", serial="1", expires_at=0),
    }


def replace_key(key: ec.EllipticCurvePrivateKey) -> Callable[[Request], Request]:
    return lambda request: Request(public_key=key.public_key(), key_digest=request.key_digest, names=request.names)


@pytest.mark.parametrize("lie", ["another key", "another device", "another authority", "no certificate"])
def test_an_answer_that_is_no_certificate_of_this_device_changes_nothing(
    home: Path, tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = certificate_in_use(home), known(home)
    monkeypatch.setattr(DeviceAuthority, "issue", _lies(tmp_path)[lie])
    assert reason(run(Renew(home=str(home), server=""), print)) == reasons.TRUST_INVALID
    assert (certificate_in_use(home), known(home)) == before


def test_what_the_server_refuses_or_does_not_answer_changes_nothing(home: Path) -> None:
    path = home / "identity" / "device.json"
    before = certificate_in_use(home)
    assert reason(run(Renew(home=str(home), server="http://127.0.0.1:1"), print)) == reasons.NETWORK
    path.write_bytes(identity.encode(msgspec.structs.replace(known(home), bearer="wrong")))
    assert reason(run(Renew(home=str(home), server=""), print)) == reasons.ENROL_REFUSED
    assert certificate_in_use(home) == before


def test_a_power_cut_leaves_the_old_pair_or_the_new_one(home: Path, tmp_path: Path) -> None:
    run(Renew(home=str(home), server=""), print)  # so that there is something to tidy
    before, left = tmp_path / "before", tmp_path / "left"
    shutil.copytree(home, before)
    old = certificate_in_use(home)
    disk = Recorder(home)
    assert isinstance(run(Renew(home=str(home), server=""), print, disk=disk), Renewed)
    new = certificate_in_use(home)
    seen = []
    for cut in range(len(disk.steps) + 1):
        loss = Loss(before, home, disk.steps, cut)
        for variant, chance in tries(disk.steps, cut, torn=TORN, seed="renewal"):
            loss.materialise(left, variant, chance)
            found = certificate_in_use(left)
            assert found in (old, new), (cut, variant.name)
            assert (known(left).not_before, known(left).not_after) == validity(found)
            seen.append(found == new)
    assert not seen[0]
    assert seen[-1]


def test_a_renewal_that_cannot_be_written_leaves_the_old_pair_and_the_next_one_tidies(home: Path) -> None:
    steps: list[tuple[str, Path]] = []
    assert isinstance(run(Renew(home=str(home), server=""), print, disk=Disk(lambda *s: steps.append(s))), Renewed)
    named = steps.index(("rename", home / "identity" / identity.DEVICE_FILE))
    for number in range(named + 1):  # after it the new pair is named already
        before = certificate_in_use(home)
        left = iter(range(1000))

        def full(step: str, path: Path, left: Iterator[int] = left, number: int = number) -> None:
            del step, path
            if next(left) == number:
                raise DeviceError(reasons.DISK_FULL, "no space left")

        answer = run(Renew(home=str(home), server=""), print, disk=Disk(full))
        assert reason(answer) == reasons.DISK_FULL
        assert certificate_in_use(home) == before, number
    assert isinstance(run(Renew(home=str(home), server=""), print), Renewed)
    assert len(list((home / "identity").glob("pair-*"))) == 2


# --- the plan -------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A supervisor that is only a clock and one timer."""

    now_s: float = 1_000_000.0
    wait_s: float = -1.0
    what: Callable[[], None] = lambda: None
    asked: list[bool] = field(default_factory=list)
    answered: Callable[[CourierAnswer], None] = lambda _: None

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self.wait_s, self.what = seconds, what

    def courier(self, only_look: bool, answered: Callable[[CourierAnswer], None]) -> None:
        self.asked.append(only_look)
        self.answered = answered

    def around(self) -> Around:
        return Around(wall_s=lambda: self.now_s, later=self.later, courier=self.courier)

    def pass_time(self) -> None:
        self.now_s += self.wait_s
        self.what()

    def valid(self, from_s: float, for_s: float) -> tuple[int, int]:
        return int((self.now_s + from_s) * US), int((self.now_s + from_s + for_s) * US)


def test_a_certificate_is_renewed_after_two_thirds_of_its_life() -> None:
    clock = Clock()
    bounds = clock.valid(0, 30 * DAY_S)
    renewal = Renewal(clock.around(), *bounds)
    renewal.start()
    begun_s = clock.now_s
    while not clock.asked:
        assert clock.wait_s <= LOOK_EVERY_S
        clock.pass_time()
    assert clock.asked == [False]
    assert 20 * DAY_S <= clock.now_s - begun_s <= 21 * DAY_S + LOOK_EVERY_S
    assert due_s(*bounds) == begun_s + 20 * DAY_S
    bounds = clock.valid(0, 30 * DAY_S)
    clock.answered(Renewed(not_before=bounds[0], not_after=bounds[1]))
    assert clock.wait_s == LOOK_EVERY_S
    assert set(renewal.describe()) == {"until", "renewed_from"}


def test_renewals_that_fail_are_tried_later_and_later_and_said() -> None:
    clock = Clock()
    renewal = Renewal(clock.around(), *clock.valid(-100, 120))
    renewal.start()
    waits = []
    for _ in range(20):
        clock.pass_time()
        clock.answered(Failed(reason=reasons.NETWORK, detail="nobody there"))
        waits.append(clock.wait_s)
    assert all(0.5 * WAIT_MIN_S * 2**n <= wait <= 1.5 * WAIT_MIN_S * 2**n for n, wait in enumerate(waits[:8]))
    assert 0.5 * WAIT_MAX_S <= waits[-1] <= 1.5 * WAIT_MAX_S
    assert renewal.describe()["trouble"] == "nobody there"
    clock.pass_time()
    bounds = clock.valid(-5, 1000)
    clock.answered(Renewed(not_before=bounds[0], not_after=bounds[1]))
    assert "trouble" not in renewal.describe()
    assert clock.asked == [False] * 21


def test_a_clock_that_is_far_ahead_does_not_renew_without_end() -> None:
    clock = Clock()
    bounds = clock.valid(-10 * DAY_S, 5 * DAY_S)
    renewal = Renewal(clock.around(), *bounds)
    renewal.start()
    for _ in range(12):
        clock.pass_time()
        clock.answered(Renewed(not_before=bounds[0], not_after=bounds[1]))
    assert clock.wait_s >= 0.5 * WAIT_MIN_S * 2**11
    assert "clocks" in renewal.describe()["trouble"]


def test_where_the_validity_is_not_noted_the_courier_is_asked_once() -> None:
    clock = Clock()
    renewal = Renewal(clock.around(), 0, 0)
    renewal.start()
    assert renewal.describe() == {}
    assert clock.wait_s == LOOK_FIRST_S
    clock.pass_time()
    bounds = clock.valid(0, 30 * DAY_S)
    clock.answered(Renewed(not_before=bounds[0], not_after=bounds[1]))
    clock.pass_time()
    assert clock.asked == [True]
    assert renewal.describe()["until"].startswith("1970-")


# --- a whole device -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_device_renews_its_certificate_by_itself_and_goes_on_talking(tmp_path: Path) -> None:
    with site(tmp_path, certificate_days=LIFE_S / DAY_S) as place, agent(place, "press") as device:
        device.until("it is connected", lambda shown: shown["connected"] == "mqtt")
        device.stop()
        keys = place.data / "keys"
        certificate, key = server_certificate(keys, tmp_path)
        front = TlsFront(place.broker_port, certificate, key, ca=keys / "devices-ca.pem")
        use_tls(device.home, front.port, place.url)
        first = f"{certificate_in_use(device.home).serial_number:x}"
        device.start()
        until(lambda: [one for one in front.serials if one != first], "it connects with another certificate", 90)
        shown = device.until("it is connected again", lambda s: s["connected"] == "mqtt" and s["certificate"])
        assert "cert     good until" in status.render(shown)
        serial = f"{certificate_in_use(device.home).serial_number:x}"
        assert serial != first
        assert known(device.home).device in front.clients
        renewed_us = known(device.home).not_after - LIFE_S * US

        def heard() -> bool:
            code, listed = place.call("GET", "/api/v1/devices/press")
            return code == 200 and listed["last_seen_at"] > renewed_us

        until(heard, "the server hears it after the renewal")
        assert device.stop() == 0
        front.close()


@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "sealed"])
def test_the_server_is_shown_the_certificate_whose_key_may_be_sealed(
    server: RunningServer, home: Path, tmp_path: Path, sealed: bool
) -> None:
    """Behind what lets in nobody without one."""
    seal = Seal(bytes(32), "migrate") if sealed else None
    disk = Disk(seal=seal)
    keys = server.settings.data / "keys"
    upstream = int(server.url.rpartition(":")[2])
    assert run(Reseal(home=str(home)), print, disk=disk) == Resealed()
    front = TlsFront(upstream, *server_certificate(keys, tmp_path), ca=keys / "devices-ca.pem")
    try:
        task = Renew(home=str(home), server=f"https://127.0.0.1:{front.port}")
        assert isinstance(run(task, print, disk=disk), Renewed)
        found = identity.load(home, seal)
        assert found is not None
        assert front.clients[-1] == found.device
        first = front.serials[-1]
        key = identity.pair_folder(home, found) / identity.KEY_FILE
        assert key.read_bytes().startswith(identity.ENCRYPTED_KEY) == sealed
        assert isinstance(run(task, print, disk=disk), Renewed)
        assert front.serials[-1] != first, "the next one is shown with the new pair"
    finally:
        front.close()
