"""`wherry-agent status`: what runs on this device, and why this variant of it.

Asked over the supervisor's unix socket; when no supervisor runs, the journal answers.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from wherry_agent import contracts, machine, shelter
from wherry_agent import state as s
from wherry_agent.accepting import accepted
from wherry_agent.disk import Disk
from wherry_agent.journal import PLACE, decode
from wherry_agent.sealing import Seal, opened
from wherry_agent.turn import CRASH_WINDOW_MS, CRASHES_MAX, flags_of, kind_of
from wherry_shared.bundle import Interface
from wherry_shared.clock import Now
from wherry_shared.errors import RefusedError, WherryError
from wherry_shared.wire import VariantTried

log = logging.getLogger(__name__)

SOCKET = "agent.sock"
SECONDS_MAX = 15.0
BYTES_MAX = 4 * 1024 * 1024
QUESTION_BYTES_MAX = 64
FLAG_CHARS_MAX = 80
"""Of a flag's value, for a person; `--json` shows it whole."""
_PHASES: dict[type[Any], str] = {
    s.Idle: "idle",
    s.Resolving: "choosing a variant",
    s.Fetching: "downloading",
    s.Judging: "in the canary",
    s.Queued: "waiting for its trial",
    s.Swapping: "being swapped in",
    s.OnTrial: "on trial",
    s.Proving: "proving itself by golden vectors",
    s.Compared: "compared; the incumbent serves alone",
    s.Returning: "going back",
    s.Waiting: "waiting to try again",
    s.Safe: "safe: serves nothing",
}


_ON_TRIAL: dict[str, str] = {
    "replace": "on trial",
    "blue_green": "on trial",
    "standby": "standing by",
    "split": "answering a share",
    "shadow": "running as a shadow",
}


def phase_words(phase: s.Phase) -> str:
    """Say what a model's phase is, in words."""
    if isinstance(phase, s.OnTrial):
        return _ON_TRIAL[kind_of(phase.job.offered)]
    return _PHASES[type(phase)]


def describe(state: s.State, now: Now, *, name: str = "") -> dict[str, object]:
    """Return the state of a device for a person or a program."""
    return {
        "device": state.device,
        "name": name,
        "project": state.project,
        "offer": [state.offer.epoch, state.offer.serial] if state.offer is not None else None,
        "trust": machine.trust_state(state, now) or ("ok" if state.trust is not None else "none yet"),
        "reports_owed": len(state.owed),
        "worker_deaths": _deaths(state.crashes, now),
        "worker_engines": [f"{name} {version}" for name, version in sorted(state.engines.loaded.items())],
        "engine_waits": _engine_waits(state.engines, now),
        "flags": dict(flags_of(state)),
        "offer_refused": state.offer.unsupported if state.offer is not None else "",
        "models": {model: _model(slot) for model, slot in sorted(state.models.items())},
        "contracts": {
            name: _contract(contract, contracts.said_by(state, name), contracts.preprocess_of(state, name))
            for name in sorted({*state.models, *state.contracts})
            if (contract := contracts.contract_of(state, name)) is not None
        },
        "known_bad": [
            {"digest": bad.digest, "engine": f"{bad.engine} {bad.engine_version}", "reason": bad.reason}
            for bad in state.known_bad
        ],
    }


def _engine_waits(engines: s.Engines, now: Now) -> list[dict[str, object]]:
    """Return what an engine that was replaced, or is missed, lets this device wait for, and for how long still."""
    waits: list[tuple[str, s.Again | s.Denied]] = [
        (f"{model} is judged with the new engine again", again) for model, again in sorted(engines.again.items())
    ]
    if engines.hand_over_again is not None:
        waits.append(("another worker is to take over", engines.hand_over_again))
    waits += [
        (f"{name} {denied.version}, which the worker could not load, is believed again", denied)
        for name, denied in sorted(engines.denied.items())
    ]
    return [
        {
            "what": what,
            "troubles": wait.troubles,
            "again_in_s": max(0, wait.wait_ms - wait.since.elapsed_ms(now)) // 1000,
        }
        for what, wait in waits
    ]


def _deaths(crashes: s.Crashes | None, now: Now) -> dict[str, object]:
    if crashes is None or crashes.since.elapsed_ms(now) > CRASH_WINDOW_MS:
        return {}
    return {"count": crashes.count, "at_most": CRASHES_MAX, "while_running": dict(crashes.running)}


def _contract(contract: Interface, by: str, preprocess: str | None) -> dict[str, object]:
    shown: dict[str, object] = {"by": by}
    for kind, specs in (("inputs", contract.inputs), ("outputs", contract.outputs)):
        shown[kind] = {spec.name: f"{spec.datatype} [{', '.join(map(str, spec.shape))}]" for spec in specs}
    if preprocess:
        shown["preprocess"] = preprocess
    return shown


def _model(slot: s.Slot) -> dict[str, Any]:
    phase = slot.phase
    shown: dict[str, Any] = {"doing": phase_words(phase)}
    if isinstance(phase, s.Swapping | s.OnTrial | s.Proving | s.Compared):
        loadable = phase.job.loadable
        shown["candidate"] = _version(loadable.target, loadable.variant, phase.job.tried)
        shown["trial"] = _trial(phase.job, phase.counts)
        if not isinstance(phase, s.Compared):
            shown["trial"]["crashes"] = phase.crashes
    elif not isinstance(phase, s.Idle | s.Safe):
        shown["candidate"] = {"target": phase.job.offered.target}
    if not isinstance(phase, s.Idle | s.Safe) and phase.job.offered.group:
        shown["group"] = phase.job.offered.group
    if isinstance(phase, s.Waiting):
        shown["trouble"] = {"reason": phase.reason, "detail": phase.detail, "again_in_s": phase.wait_ms // 1000}
    if isinstance(phase, s.Safe):
        shown["trouble"] = {"reason": phase.reason, "detail": phase.detail}
        if slot.held is not None:
            shown["trouble"] |= {"held": slot.held.version.offered.target, "again_in_s": slot.held.wait_ms // 1000}
    if slot.incumbent is not None:
        loadable = slot.incumbent.loadable
        serves = _version(loadable.target, loadable.variant, slot.incumbent.tried)
        shown["serves"] = {**serves, "engine": f"{loadable.engine} {loadable.engine_version}"}
    if slot.told is not None:
        told = slot.told
        last = {"state": told.state, "target": told.target, "reason": told.reason, "detail": told.detail}
        shown["last_report"] = {key: value for key, value in last.items() if value}
    return shown


def _trial(job: s.Job, counts: s.Counts) -> dict[str, object]:
    offered = job.offered
    shown: dict[str, object] = {"mode": offered.mode, "share": offered.share}
    shown |= {
        "requests": counts.requests + counts.earlier_requests,
        "errors": counts.errors + counts.earlier_errors,
        "fallbacks": counts.fallbacks + counts.earlier_fallbacks,
        "restarts": job.restarts,
        "downs": job.downs,
    }
    if offered.mode == "shadow":
        shown |= {
            "compared": counts.compared + counts.earlier_compared,
            "agreed": counts.agreed + counts.earlier_agreed,
            "skipped": counts.skipped + counts.earlier_skipped,
        }
    return shown


def _version(target: str, variant: str, tried: tuple[VariantTried, ...]) -> dict[str, object]:
    why = next((one.why for one in reversed(tried) if one.id == variant), "")
    others = [f"{one.id}: {one.outcome} {one.reason} {one.why}".strip() for one in tried if one.id != variant]
    shown: dict[str, Any] = {"target": target, "variant": variant, "why": why}
    measured = next((one for one in reversed(tried) if one.id == variant and one.latency_p50_us), None)
    if measured is not None:
        figures = ("latency_p50_us", "latency_p99_us", "incumbent_p50_us", "incumbent_p99_us")
        shown["canary"] = {name: round(value, 1) for name in figures if (value := getattr(measured, name))}
        if measured.peak_memory_bytes:
            shown["canary"]["peak_memory_bytes"] = measured.peak_memory_bytes
    if others:
        shown["others"] = others
    return shown


def _canary_words(figures: dict[str, float]) -> str:
    """Say in words what the canary measured."""
    ours, theirs = (
        f"median {figures.get(f'{whose}_p50_us', 0):.0f} µs, 99 % within {figures.get(f'{whose}_p99_us', 0):.0f} µs"
        for whose in ("latency", "incumbent")
    )
    if figures.get("peak_memory_bytes"):
        ours += f", {figures['peak_memory_bytes'] / 1e6:.1f} MB at its peak"
    return f"{ours}; the version before it {theirs}" if "incumbent_p50_us" in figures else ours


class Server:
    """Answers on a unix socket: one question, a word and a newline, and one JSON document per connection."""

    def __init__(self, path: Path, answers: dict[str, Callable[[], object]]) -> None:
        self._path = path
        self._answers = answers
        self._closed = False
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._main, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._closed = True
        with contextlib.suppress(OSError):  # not connected: shutdown only wakes the accepting thread
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _main(self) -> None:
        for connection in accepted(self._socket, lambda: self._closed):
            with connection:
                connection.settimeout(SECONDS_MAX)
                try:
                    question = connection.recv(QUESTION_BYTES_MAX).decode(errors="replace").strip()
                    answer = self._answers.get(question, self._answers["status"])
                    connection.sendall(msgspec.json.encode(answer()))
                except (OSError, WherryError) as error:
                    log.warning("status: %s", error)
                except Exception:  # a border: a question that cannot be answered must not end the answers to others
                    log.exception("status")


def ask(home: Path, seal: Callable[[], Seal | None] = lambda: None) -> dict[str, Any]:
    """Return the status of the agent on `home`, from its journal if it does not run; then `seal` is asked for, too.

    Raises:
        RefusedError: `no_agent`, there is neither; or as `journal.decode` and `sealing.opened`.
        DeviceError: the key for the journal cannot be had.
    """
    answer = question(home, "status")
    if answer is not None:
        return {"running": True, **answer}
    record = Disk().read(home / "journal.json")
    if record is None:
        raise RefusedError(
            "no_agent",
            f"no agent runs on {home}, and it holds no journal",
            next_step="start one with wherry-agent run, or name its --home",
        )
    state = decode(opened(seal(), PLACE, record).data)
    return {"running": False, **describe(state, Now("", 0, time.time()))}


def question(home: Path, word: str) -> dict[str, Any] | None:
    """Ask the agent that runs on `home`; None if there is none.

    Raises:
        RefusedError: `no_agent`, the answer does not end.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(SECONDS_MAX)
            shelter.connect(connection, home / "run" / SOCKET)
            connection.sendall(f"{word}\n".encode())
            data = bytearray()
            while chunk := connection.recv(1 << 16):
                data += chunk
                if len(data) > BYTES_MAX:
                    raise RefusedError("no_agent", "the agent's answer does not end")
        return msgspec.json.decode(bytes(data), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return None


def wait_words(wait: dict[str, Any]) -> str:
    """Say one of `engine_waits`."""
    return f"{wait['what']} in {wait['again_in_s']} s, after {wait['troubles']} times in vain"


def render(shown: dict[str, Any]) -> str:
    """Return the status as text for a person."""
    lines = [f"device   {shown['device']} {shown.get('name', '')}".rstrip()]
    if shown["running"]:
        none = "none works (wherry-agent doctor says what to do)" if shown.get("engines_probed") else "being probed"
        engines = ", ".join(shown["engines"]) or none
        lines += [
            f"agent    {shown['agent']}, up {shown['uptime_s']:.0f} s, engines: {engines}",
            f"server   {shown['server']}, connected: {shown['connected']}, reports owed: {shown['reports_owed']}",
            *_certificate(shown.get("certificate", {})),
            f"serves   {shown['http']}{_grpc(shown)}",
        ]
        old = [one for one in shown["worker_engines"] if one not in shown["engines"]]
        lines += [f"worker   still has {', '.join(old)} in memory"] if old and shown["engines"] else []
        for one in shown.get("engine_waits", []):
            lines.append(f"waits    {wait_words(one)}")
        for one in shown.get("handles", []):
            late = "" if one["settled"] else ", has not acted on its newest version yet"
            lines.append(f"handle   {one['model']} in process {one['pid']} ({one['isolation']}){late}")
    else:
        lines.append("agent    is not running; this is what its journal says")
    if shown.get("worker_deaths"):
        lines.append(f"worker   {deaths_words(shown['worker_deaths'])}")
    lines.append(f"trust    {shown['trust']}")
    if shown.get("offer_refused"):
        lines.append(f"offer    not acted on: {shown['offer_refused']}")
    lines += [f"offer    not verified yet: {words}" for words in shown.get("offers_not_verified", [])]
    for key, value in shown.get("flags", {}).items():
        lines.append(f"flag     {key} = {msgspec.json.encode(value).decode()[:FLAG_CHARS_MAX]}")
    lines += [f"samples  {words}" for words in shown.get("samples", [])]
    for name, model in shown["models"].items():
        lines.append(f"\n{name}: {model['doing']}")
        for key in ("serves", "candidate"):
            version = model.get(key)
            if version is not None:
                variant = f" variant {version['variant']}" if "variant" in version else ""
                lines.append(f"  {key:<10}{version['target']}{variant}")
                lines += [f"    because {version['why']}"] if version.get("why") else []
                lines += [f"    canary: {_canary_words(version['canary'])}"] if version.get("canary") else []
                lines += [f"    not {other}" for other in version.get("others", [])]
        done, total = shown.get("downloads", {}).get("running", {}).get(name, (0, 0))
        if total:
            lines.append(f"  download  {done} of {total} bytes")
        if "group" in model:
            lines.append(f"  group     {model['group']}, all or none")
        if "trial" in model:
            trial = model["trial"]
            crashes = f", the worker died {_times(trial['crashes'])}" if trial.get("crashes") else ""
            lines.append(f"  trial     {_how(trial)}{trial['requests']} requests, {trial['errors']} errors{crashes}")
            if "compared" in trial:
                agreed = f"{trial['agreed']} of {trial['compared']} answers agree with the incumbent's"
                lines.append(f"    {agreed}, {trial['skipped']} runs left out for the CPU budget")
        for key in ("trouble", "last_report"):
            if key in model:
                said = [f"waits {v} s" if k == "again_in_s" else str(v) for k, v in model[key].items()]
                lines.append(f"  {key.replace('_', ' '):<12}" + " · ".join(said))
    for name, contract in shown.get("contracts", {}).items():
        lines.append(f"\ncontract of {name} (by {contract['by']})")
        for kind in ("inputs", "outputs"):
            lines.append(f"  {kind:<10}" + ", ".join(f"{tensor} {what}" for tensor, what in contract[kind].items()))
        lines += [f"  preprocess {contract['preprocess']}"] if "preprocess" in contract else []
    if not shown["models"]:
        lines.append("\nno models yet")
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def deaths_words(deaths: dict[str, Any]) -> str:
    """Say in words how often the worker died outside trials, and whose run it was."""
    running = ", ".join(f"{model} in {times}" for model, times in sorted(deaths["while_running"].items()))
    what = f", while it ran {running} of them" if running else ""
    return f"died {_times(deaths['count'])} of late{what}; {deaths['at_most']} are allowed"


def _certificate(certificate: dict[str, str]) -> list[str]:
    if not certificate:
        return []
    words = f"good until {certificate['until']}, renewed after {certificate['renewed_from']}"
    trouble = certificate.get("trouble", "")
    return [f"cert     {words}", *([f"         not renewed yet: {trouble}"] if trouble else [])]


def _grpc(shown: dict[str, Any]) -> str:
    """Say where gRPC is served, or why it is not; nothing where it is off."""
    if not shown.get("grpc"):
        return ""
    places = [(shown["grpc"], shown.get("grpc_doing", "served"))]
    if shown.get("grpc_socket"):
        places.append((f"unix:{shown['grpc_socket']}", shown.get("grpc_socket_doing", "served")))
    return "".join(f", gRPC {place}" + ("" if doing == "served" else f" ({doing})") for place, doing in places)


def _how(trial: dict[str, Any]) -> str:
    """Say in words how a candidate is tried; nothing where it simply takes over."""
    return "" if trial["mode"] == "replace" else f"{trial['mode'].replace('_', '-')} of {trial['share']:.0%}, "
