"""Every operation of the API as a value: what to send, and the type of what comes back.

Each function has the name of an operation in `/openapi.json` and makes no call itself: `Client.send` and `AsyncClient.send` do, so
that both know the whole API from one list. A test compares this module with the description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import msgspec

from wherry_server import answers

T = TypeVar("T")
Command = Literal["start", "pause", "resume", "abort", "revert", "retry", "retry_failed"]
API = "/api/v1"


class Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One operation with its arguments."""

    method: str
    path: str
    result: Any
    """The type of the answer: of JSON; `bytes` as it is; None: there is none."""
    params: Mapping[str, Any] = {}
    body: Any = None
    content: bytes | None = None
    if_match: str = ""


def _get(path: str, result: type[T], **params: Any) -> Call[T]:
    given = {name: value for name, value in params.items() if value not in (None, "")}
    return Call(method="GET", path=API + path, result=result, params=given)


def _post(path: str, result: type[T], body: Any = None, if_match: str = "") -> Call[T]:
    return Call(method="POST", path=API + path, result=result, body={} if body is None else body, if_match=if_match)


def _delete(path: str, if_match: str = "") -> Call[None]:
    return Call(method="DELETE", path=API + path, result=None, if_match=if_match)


def _q(part: object) -> str:
    return quote(str(part), safe=":")


# --- bundles ------------------------------------------------------------------------------------


def publish_bundle(model: str, version: str, manifest: str) -> Call[answers.BundleDetail]:
    """Release a bundle whose blobs are uploaded and whose bin is signed."""
    return _post("/bundles", answers.BundleDetail, {"model": model, "version": version, "manifest": manifest})


def list_bundles(model: str | None = None, limit: int | None = None) -> Call[list[answers.BundleSummary]]:
    """List bundles, the newest version of each model first."""
    return _get("/bundles", list[answers.BundleSummary], model=model, limit=limit)


def show_bundle(model: str, version: str) -> Call[answers.BundleDetail]:
    """Show a bundle with its signed config."""
    return _get(f"/bundles/{_q(model)}/{_q(version)}", answers.BundleDetail)


def list_models(name: str = "", limit: int | None = None) -> Call[list[answers.ModelSummary]]:
    """List models."""
    return _get("/models", list[answers.ModelSummary], name=name, limit=limit)


def upload_blob(digest: str, content: bytes) -> Call[answers.Uploaded]:
    """Upload a blob; `wherry_shared.publishing.push` streams large ones."""
    return Call(method="PUT", path=f"{API}/blobs/{_q(digest)}", result=answers.Uploaded, content=content)


def has_blob(digest: str) -> Call[bool]:
    """Tell whether a blob is here."""
    return Call(method="HEAD", path=f"{API}/blobs/{_q(digest)}", result=bool)


# --- trust --------------------------------------------------------------------------------------


def trust_state() -> Call[dict[str, Any]]:
    """Roles, versions, publishers and their bins."""
    return _get("/trust", dict[str, Any])


def offline_metadata() -> Call[dict[str, Any]]:
    """Every root, and the targets metadata."""
    return _get("/trust/offline", dict[str, Any])


def put_offline(roots: Sequence[bytes], targets: bytes | None) -> Call[dict[str, Any]]:
    """Hand in what a ceremony signed."""
    body = {"roots": [root.decode() for root in roots], "targets": targets.decode() if targets else ""}
    return Call(method="PUT", path=f"{API}/trust/offline", result=dict[str, Any], body=body)


def add_publisher(
    name: str, public_keys_pem: Sequence[str], models: Sequence[str], threshold: int = 1
) -> Call[dict[str, Any]]:
    """Delegate models to a publisher."""
    body = {"name": name, "public_keys_pem": list(public_keys_pem), "models": list(models), "threshold": threshold}
    return _post("/trust/publishers", dict[str, Any], body)


def bin_of_target(target: str) -> Call[bytes]:
    """The bin into which MODEL/VERSION falls, as it was signed."""
    return _get("/trust/bins", bytes, target=target)


def bin_by_role(role: str) -> Call[bytes]:
    """The current bytes of a bin or publisher role."""
    return _get(f"/trust/bins/{_q(role)}", bytes)


def put_bin(role: str, content: bytes, replaces: int) -> Call[dict[str, Any]]:
    """Hand in the next version of a bin, signed by its publisher."""
    return Call(
        method="PUT",
        path=f"{API}/trust/bins/{_q(role)}",
        result=dict[str, Any],
        content=content,
        if_match=f'"{replaces}"',
    )


def proposal(role: str) -> Call[bytes]:
    """What stands as proposed for a bin."""
    return _get(f"/trust/proposals/{_q(role)}", bytes)


def withdraw_proposal(role: str) -> Call[None]:
    """Drop a proposal."""
    return _delete(f"/trust/proposals/{_q(role)}")


# --- fleet --------------------------------------------------------------------------------------


def list_devices(
    name: str | None = None,
    state: str | None = None,
    model: str | None = None,
    cohort: str | None = None,
    selector: str | None = None,
    limit: int | None = None,
) -> Call[answers.DeviceList]:
    """List devices by name."""
    whom = {"name": name, "state": state, "model": model, "cohort": cohort, "selector": selector}
    return _get("/devices", answers.DeviceList, **whom, limit=limit)


def show_device(device: str) -> Call[answers.DeviceDetail]:
    """Show a device by id or name."""
    return _get(f"/devices/{_q(device)}", answers.DeviceDetail)


def show_logs(device: str) -> Call[answers.DeviceLogs]:
    """Show the last log lines that a device sent."""
    return _get(f"/devices/{_q(device)}/logs", answers.DeviceLogs)


def request_logs(device: str) -> Call[answers.LogsRequested]:
    """Ask a device for its last log lines."""
    return _post(f"/devices/{_q(device)}/logs", answers.LogsRequested)


def end_device(
    device: str, ending: Literal["revoke", "decommission"], if_match: str = "", wipe: str = ""
) -> Call[answers.Ended]:
    """Shut a device out."""
    found = _post(f"/devices/{_q(device)}/{ending}", answers.Ended, if_match=if_match)
    return msgspec.structs.replace(found, params={"wipe": wipe} if wipe else {})


def readmit_device(device: str) -> Call[answers.Readmitted]:
    """Let a device in again."""
    return _post(f"/devices/{_q(device)}/readmit", answers.Readmitted)


def list_enrolment_requests(limit: int | None = None) -> Call[list[answers.EnrolmentShown]]:
    """List the keys that wait for a person, may enrol, or were refused."""
    return _get("/enrolment-requests", list[answers.EnrolmentShown], limit=limit)


def expect_device(
    public_key: str, name: str = "", labels: Mapping[str, str] | None = None, days: int = 30
) -> Call[answers.Expected]:
    """Let the device with a key in when it comes, without a secret."""
    body = {"public_key": public_key, "name": name, "labels": dict(labels or {}), "days": days}
    return _post("/enrolment-requests", answers.Expected, body)


def settle_enrolment(key: str, verdict: Literal["accept", "refuse"]) -> Call[answers.EnrolmentShown]:
    """Accept or refuse a key that waits."""
    return _post(f"/enrolment-requests/{_q(key)}/{verdict}", answers.EnrolmentShown)


def fleet_state() -> Call[answers.FleetState]:
    """Count devices by model, version and state."""
    return _get("/fleet", answers.FleetState)


# --- cohorts ------------------------------------------------------------------------------------


def list_cohorts(name: str = "", limit: int | None = None) -> Call[list[answers.CohortShown]]:
    """List the saved cohorts."""
    return _get("/cohorts", list[answers.CohortShown], name=name, limit=limit)


def create_cohort(name: str, selector: str, *, static: bool = False) -> Call[answers.CohortShown]:
    """Save a cohort under a new name; a static one keeps whom the selector takes now."""
    return _post("/cohorts", answers.CohortShown, {"name": name, "selector": selector, "static": static})


def preview_cohort(selector: str) -> Call[answers.Preview]:
    """Say whom a selector takes now."""
    return _post("/cohorts/preview", answers.Preview, {"selector": selector})


def show_cohort(name: str) -> Call[answers.CohortDetail]:
    """Show a cohort and whom it takes now."""
    return _get(f"/cohorts/{_q(name)}", answers.CohortDetail)


def change_cohort(name: str, selector: str, if_match: str = "", *, static: bool = False) -> Call[answers.CohortShown]:
    """Give a cohort another selector; a static one keeps whom it takes now."""
    return Call(
        method="PUT",
        path=f"{API}/cohorts/{_q(name)}",
        result=answers.CohortShown,
        body={"selector": selector, "static": static},
        if_match=if_match,
    )


def delete_cohort(name: str, if_match: str = "") -> Call[None]:
    """Forget a cohort."""
    return _delete(f"/cohorts/{_q(name)}", if_match)


# --- flags --------------------------------------------------------------------------------------


def list_flags(name: str = "", limit: int | None = None) -> Call[list[answers.FlagShown]]:
    """List the flags by name."""
    return _get("/flags", list[answers.FlagShown], name=name, limit=limit)


def create_flag(wish: Mapping[str, Any]) -> Call[answers.FlagShown]:
    """Make a flag; the wish has the fields of docs/flags.md."""
    return _post("/flags", answers.FlagShown, dict(wish))


def preview_flag(wish: Mapping[str, Any]) -> Call[answers.FlagPreview]:
    """Say who would have which variant, without saving it."""
    return _post("/flags/preview", answers.FlagPreview, dict(wish))


def show_flag(flag: str) -> Call[answers.FlagDetail]:
    """Show a flag, and how many devices should have which variant by what."""
    return _get(f"/flags/{_q(flag)}", answers.FlagDetail)


def change_flag(flag: str, wish: Mapping[str, Any], if_match: str = "") -> Call[answers.FlagShown]:
    """Give a flag another definition."""
    body = {name: value for name, value in wish.items() if name != "name"}
    return Call(method="PUT", path=f"{API}/flags/{_q(flag)}", result=answers.FlagShown, body=body, if_match=if_match)


def delete_flag(flag: str, if_match: str = "") -> Call[None]:
    """Delete a flag that no rollout gives."""
    return _delete(f"/flags/{_q(flag)}", if_match)


def explain_flag(flag: str, device: str) -> Call[answers.FlagExplained]:
    """Say which variant a device should have and why, and whether it knows."""
    return _get(f"/flags/{_q(flag)}/devices/{_q(device)}", answers.FlagExplained)


# --- rollouts -----------------------------------------------------------------------------------


def list_rollouts(
    model: str | None = None, state: str | None = None, limit: int | None = None
) -> Call[list[answers.RolloutSummary]]:
    """List rollouts, newest first."""
    return _get("/rollouts", list[answers.RolloutSummary], model=model, state=state, limit=limit)


def create_rollout(wish: Mapping[str, Any]) -> Call[answers.RolloutDetail]:
    """Create a rollout from the fields of a plan."""
    return _post("/rollouts", answers.RolloutDetail, dict(wish))


def show_rollout(number: int) -> Call[answers.RolloutDetail]:
    """Show a rollout."""
    return _get(f"/rollouts/{number}", answers.RolloutDetail)


def list_decisions(number: int, after: int = 0, limit: int | None = None) -> Call[list[answers.DecisionShown]]:
    """List what was decided and on what evidence, oldest first."""
    return _get(f"/rollouts/{number}/decisions", list[answers.DecisionShown], after=after or None, limit=limit)


def list_rollout_devices(
    number: int, state: str = "", stage: int | None = None, limit: int | None = None
) -> Call[list[answers.RolloutDevice]]:
    """List the devices that a rollout exposed, and where each one stands."""
    return _get(f"/rollouts/{number}/devices", list[answers.RolloutDevice], state=state, stage=stage, limit=limit)


def explain_rollout(number: int, device: str = "") -> Call[answers.Explained]:
    """Explain where a rollout, and a device in it, is, and replay what was decided."""
    return _get(f"/rollouts/{number}/explain", answers.Explained, device=device)


def simulate_rollout(wish: dict[str, Any]) -> Call[answers.Forecast]:
    """Forecast a plan over the fleet as it stands, or over a synthetic one."""
    return _post("/forecasts", answers.Forecast, wish)


def approve_rollout(number: int, stage: int = 1, round_: int = 1) -> Call[answers.RolloutDetail]:
    """Agree that a stage of a round begins."""
    return _post(f"/rollouts/{number}/approvals", answers.RolloutDetail, {"stage": stage, "round": round_})


def list_quarantine(
    model: str = "", reason: str = "", device: str = "", limit: int | None = None
) -> Call[list[answers.Quarantined]]:
    """List the devices in quarantine, with the reason."""
    return _get("/quarantine", list[answers.Quarantined], model=model, reason=reason, device=device, limit=limit)


def release_device(device: str, model: str) -> Call[answers.Released]:
    """Let a device out of quarantine."""
    return _post("/quarantine/release", answers.Released, {"device": device, "model": model})


def list_hardware(limit: int | None = None) -> Call[list[answers.KnownBad]]:
    """List the bundles that are known to be bad, by hardware class."""
    return _get("/quarantine/hardware", list[answers.KnownBad], limit=limit)


def clear_hardware(manifest: str, hardware_class: str) -> Call[None]:
    """Forget that a bundle is bad on a hardware class."""
    body = {"manifest": manifest, "hardware_class": hardware_class}
    return Call(method="POST", path=API + "/quarantine/hardware/clear", result=None, body=body)


def command_rollout(number: int, command: Command, if_match: str = "") -> Call[answers.RolloutDetail]:
    """Write a command down for the director."""
    return _post(f"/rollouts/{number}/{command}", answers.RolloutDetail, if_match=if_match)


def roll_back(model: str, device: str | None = None) -> Call[answers.RolloutDetail]:
    """Bring a model back to what ran before."""
    return _post("/rollbacks", answers.RolloutDetail, {"model": model, "device": device})


def follow_rollout(number: int, seconds: int | None = None) -> Call[bytes]:
    """Follow a rollout; `Client.follow` reads the stream and reconnects."""
    return _get(f"/rollouts/{number}/events", bytes, seconds=seconds)


# --- webhooks -----------------------------------------------------------------------------------


def list_webhooks(limit: int | None = None) -> Call[list[answers.WebhookShown]]:
    """List the webhooks."""
    return _get("/webhooks", list[answers.WebhookShown], limit=limit)


def create_webhook(name: str, url: str, types: Sequence[str] = ("*",)) -> Call[answers.WebhookMade]:
    """Make a webhook; its secret is shown this once."""
    return _post("/webhooks", answers.WebhookMade, {"name": name, "url": url, "types": list(types)})


def show_webhook(name: str) -> Call[answers.WebhookShown]:
    """Show a webhook, how many events have not arrived, and how its receiver fares."""
    return _get(f"/webhooks/{_q(name)}", answers.WebhookShown)


def change_webhook(name: str, url: str, types: Sequence[str], if_match: str = "") -> Call[answers.WebhookShown]:
    """Give a webhook another address and other types; its secret stays."""
    return Call(
        method="PUT",
        path=f"{API}/webhooks/{_q(name)}",
        result=answers.WebhookShown,
        body={"url": url, "types": list(types)},
        if_match=if_match,
    )


def delete_webhook(name: str, if_match: str = "") -> Call[None]:
    """Forget a webhook."""
    return _delete(f"/webhooks/{_q(name)}", if_match)


def list_deliveries(name: str, state: str | None = None, limit: int | None = None) -> Call[list[answers.Delivery]]:
    """List what has not arrived at a webhook."""
    return _get(f"/webhooks/{_q(name)}/deliveries", list[answers.Delivery], state=state, limit=limit)


def redeliver_event(name: str, event: int) -> Call[answers.Redelivered]:
    """Send an event that has not arrived once more."""
    return _post(f"/webhooks/{_q(name)}/deliveries/{event}/redeliver", answers.Redelivered)


# --- access, audit, health ----------------------------------------------------------------------


def create_token(
    name: str, role: str, days: int = 90, models: Sequence[str] = (), cohorts: Sequence[str] = ()
) -> Call[answers.TokenMade]:
    """Make an API token; it is shown this once. Models and cohorts narrow what it may change."""
    scope = {"models": list(models), "cohorts": list(cohorts)}
    return _post("/tokens", answers.TokenMade, {"name": name, "role": role, "days": days, **scope})


def list_tokens(name: str = "", role: str | None = None, limit: int | None = None) -> Call[list[answers.TokenSummary]]:
    """List API tokens, the oldest first."""
    return _get("/tokens", list[answers.TokenSummary], name=name, role=role, limit=limit)


def show_token(token_id: str) -> Call[answers.TokenSummary]:
    """Show an API token."""
    return _get(f"/tokens/{_q(token_id)}", answers.TokenSummary)


def revoke_token(token_id: str, if_match: str = "") -> Call[None]:
    """Revoke an API token."""
    return _delete(f"/tokens/{_q(token_id)}", if_match)


def show_me() -> Call[answers.Me]:
    """Show who asks and what was granted to them."""
    return _get("/me", answers.Me)


def list_sessions(limit: int | None = None) -> Call[list[answers.SessionShown]]:
    """List who is logged in."""
    return _get("/sessions", list[answers.SessionShown], limit=limit)


def revoke_session(session: str) -> Call[None]:
    """End somebody's session."""
    return _delete(f"/sessions/{_q(session)}")


def create_enrolment_token(
    uses: int = 1, days: int = 7, labels: Mapping[str, str] | None = None, *, hold: bool = False
) -> Call[answers.TokenMade]:
    """Make a token by which devices enrol; with `hold` a person has to accept each."""
    body = {"uses": uses, "days": days, "labels": dict(labels or {}), "hold": hold}
    return _post("/enrolment-tokens", answers.TokenMade, body)


def list_audit(
    actor: str = "", action: str = "", subject: str = "", before: int | None = None, limit: int | None = None
) -> Call[list[answers.Entry]]:
    """List entries of the audit log, the newest first."""
    return _get("/audit", list[answers.Entry], actor=actor, action=action, subject=subject, before=before, limit=limit)


def export_audit(after: int = 0) -> Call[bytes]:
    """The audit log behind an entry as lines of JSON, the oldest first."""
    return _get("/audit/export", bytes, after=after or None)


def verify_audit(unsealed: int = 0) -> Call[answers.Verdict]:
    """Compute the whole chain of the audit log again; that many entries at its beginning may have no seal."""
    return _get("/audit/verify", answers.Verdict, unsealed=unsealed or None)


def health() -> Call[answers.Health]:
    """Tell whether the server and its database answer."""
    return _get("/health", answers.Health)
