"""Writes docs/access.md: what every operation and every command needs, and which roles have it."""

from __future__ import annotations

from pathlib import Path

from wherry_server import access
from wherry_server.app import ROUTERS
from wherry_server.grants import MAY, ROLES

PAGE = Path(__file__).parents[2] / "docs" / "access.md"
LOCAL = "-"
"""Needs no server: it works on this machine, by the rights of its user."""

VERBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dev": (LOCAL, ()),
    "init": (LOCAL, ()),
    "serve": (LOCAL, ()),
    "doctor": (LOCAL, ()),
    "blobs collect": (LOCAL, ()),
    "rollout schema": (LOCAL, ()),
    "health": ("public", ()),
    "deploy": ("operate", ("file-type:1.1.0", "--cohort", "berlin")),
    "rollback": ("operate", ("file-type",)),
    "fleet": ("read", ()),
    "apply": ("operate", ("--file", "FLEET", "--yes")),
    "bundle push": ("publish", ("BUNDLE", "--key", "KEY")),
    "bundle verify": (LOCAL, ()),
    "bundle list": ("read", ()),
    "bundle show": ("read", ("file-type:1.1.0",)),
    "model list": ("read", ()),
    "device list": ("read", ()),
    "device show": ("read", ("bench-1",)),
    "device revoke": ("operate", ("nobody",)),
    "device decommission": ("operate", ("nobody",)),
    "device readmit": ("operate", ("nobody",)),
    "device invite": ("operate", ()),
    "device expect": (
        "operate",
        (
            "--key",
            "KEY",
        ),
    ),
    "device pending": ("operate", ()),
    "device accept": ("operate", ("nobody",)),
    "device refuse": ("operate", ("nobody",)),
    "broker config": (LOCAL, ()),
    "broker revoked": (LOCAL, ()),
    "proxy config": (LOCAL, ()),
    "keys init": (LOCAL, ()),
    "keys rotate": (LOCAL, ()),
    "keys prune": (LOCAL, ()),
    "keys wrap": (LOCAL, ()),
    "keys status": (LOCAL, ()),
    "device logs": ("operate", ("nobody", "--wait", "0")),
    "cohort list": ("read", ()),
    "cohort create": ("operate", ("made", "all")),
    "cohort change": ("operate", ("berlin", "label.site = berlin")),
    "cohort show": ("read", ("berlin",)),
    "cohort preview": ("read", ("all",)),
    "cohort delete": ("operate", ("none",)),
    "rollout create": ("operate", ("file-type:1.1.0", "--cohort", "berlin")),
    "rollout list": ("read", ()),
    "rollout show": ("read", ("1",)),
    "rollout decisions": ("read", ("1",)),
    "rollout devices": ("read", ("1",)),
    "rollout explain": ("read", ("1",)),
    "rollout simulate": ("read", ("PLAN", "--devices", "10", "--runs", "1")),
    "rollout watch": ("read", ("99",)),
    "rollout approve": ("approve", ("1",)),
    "rollout start": ("operate", ("99",)),
    "rollout pause": ("operate", ("1",)),
    "rollout resume": ("operate", ("1",)),
    "rollout abort": ("operate", ("99",)),
    "rollout retry": ("operate", ("1",)),
    "rollout retry-failed": ("operate", ("1",)),
    "rollout revert": ("operate", ("1",)),
    "flag list": ("read", ()),
    "flag show": ("read", ("threshold",)),
    "flag create": ("operate", ("made", "--type", "boolean", "--variant", "on=true", "--default", "on")),
    "flag set": ("operate", ("threshold", "--default", "old", "--yes")),
    "flag preview": ("read", ("threshold", "--default", "old")),
    "flag rollout": ("operate", ("threshold", "old", "--cohort", "berlin")),
    "flag delete": ("operate", ("none",)),
    "quarantine list": ("read", ()),
    "quarantine release": ("operate", ("bench-1", "file-type")),
    "quarantine hardware": ("read", ()),
    "quarantine clear": ("operate", ("file-type:1.1.0", "x86_64")),
    "token create": ("operate", ()),
    "token api": ("administer", ("made",)),
    "token list": ("administer", ()),
    "token show": ("administer", ("0" * 12,)),
    "token revoke": ("administer", ("0" * 12,)),
    "trust status": ("read", ()),
    "trust key": (LOCAL, ()),
    "trust online-keys": (LOCAL, ()),
    "trust init": (LOCAL, ()),
    "trust show": (LOCAL, ()),
    "trust sign": (LOCAL, ()),
    "trust root rotate": (LOCAL, ()),
    "trust root renew": (LOCAL, ()),
    "trust director rotate": (LOCAL, ()),
    "trust publisher revoke": (LOCAL, ()),
    "trust publisher add": ("administer", ("other", "--key", "PUBLIC", "--model", "other")),
    "trust fetch": ("read", ("nowhere", "--root-digest", "0" * 64)),
    "trust submit": ("administer", ("CEREMONY", "--again")),
    "trust adopt": ("publish", ("nobody", "--key", "KEY")),
    "trust cosign": ("publish", ("--key", "KEY")),
    "trust role": ("read", ("none",)),
    "trust withdraw": ("publish", ("none",)),
    "trust policy": ("publish", ("file-type", "--floor", "1.0.0", "--key", "KEY")),
    "trust renew": ("publish", ("--key", "KEY")),
    "trust repair": ("publish", ("--key", "KEY")),
    "login": (LOCAL, ()),
    "logout": (LOCAL, ()),
    "whoami": ("read", ()),
    "session list": ("administer", ()),
    "session revoke": ("administer", ("0" * 12,)),
    "audit list": ("read", ()),
    "audit export": ("read", ("EXPORT",)),
    "audit verify": ("read", ()),
    "webhook list": ("read", ()),
    "webhook create": ("administer", ("made", "https://chat.example/hook")),
    "webhook show": ("read", ("none",)),
    "webhook change": ("administer", ("none", "--url", "https://chat.example/hook", "--type", "*")),
    "webhook delete": ("administer", ("none",)),
    "webhook deliveries": ("read", ("none",)),
    "webhook redeliver": ("operate", ("none", "1")),
}
"""Verb → what it needs, and arguments with which a test gives it; words in capitals stand for files of the test."""

HEAD = """# Who may do what

Whatever is not granted is refused: an operation that does not say what it needs keeps the server from starting. Roles are apart, so
that none of them alone brings something to a fleet.

| role | is for |
|---|---|
| viewer | looking |
| operator | rollouts, cohorts, flags, devices, quarantine, enrolment tokens |
| approver | agreeing that a stage of a rollout begins; who made the rollout may not, unless its plan allows it |
| publisher | uploading and releasing bundles; what counts is still the publisher's own signature |
| admin | all of that, tokens, publishers, webhooks |

`wherry token api NAME --role ROLE --model M --cohort C` narrows a role. The token then changes only what lies within: a rollout of
these models only, for one of these cohorts by name, or for a device that such a cohort takes now. What is of the whole project
(cohorts themselves, flags, enrolment tokens, hardware known to be bad) is out of its reach, and the answer is 403 `scope_missing`.
Reading is not narrowed; what must not be read belongs into a project of its own.

## Projects

A project has its own models, fleet, keys and people, and is a set of processes with a data folder of its own
([ADR 33](adr/0033-a-project-is-a-set-of-processes.md)). Several may share a database server:

```console
$ wherry init --project line-3 --data /srv/line-3 --database postgresql+asyncpg://…/wherry --port 8410 --broker-port 8411 --development-trust
$ wherry serve api --data /srv/line-3
```

Give each a host name of its own where browsers log in, and its own prefix where blobs are in a bucket.

## People

Where `settings.json` names an OpenID provider, people log in: a browser at `/auth/login`, the command line by `wherry login`
(`wherry logout`, `wherry whoami`, `wherry session list` and `revoke`). What they may do follows from their groups, as the settings
say it now; who is in none of them cannot log in.

```json
{"oidc": {"issuer": "https://id.example.org", "client_id": "wherry", "public_url": "https://wherry.example.org",
          "groups": {"ml-admins": [{"role": "admin"}], "line-3": [{"role": "operator", "cohorts": ["line-3"]}]}}}
```

The client is registered with the redirect address `PUBLIC_URL/auth/callback`; its secret, if it has one, is put into
`keys/oidc.secret` of the data folder. The server uses the authorization code flow with PKCE and checks signature (RS256, PS256,
ES256), issuer, audience, times and nonce of the ID token. Without https only loopback addresses are served.

There is no console: after a login a browser gets `/api/v1/me` and reads the API with its cookie. People work by the command line.

A session ends after `session_hours` (8). A browser keeps it in a cookie (`HttpOnly`, `SameSite=Lax`, over https `Secure` and
`__Host-`), so a change needs `X-CSRF-Token` too: `csrf_token` of `GET /api/v1/me`. The command line gets a session of its own, after
the person agreed to it on a page of the server; it is in `~/.config/wherry/login.json`, mode 0600.

`tests/server/test_access.py` tries every row with every role. This page is written by `python -m tests.server.access_page`.

"""


def _row(shown: list[str], need: str, *, scoped: bool | None = None) -> str:
    if need in ("public", "device", LOCAL):
        words = {"public": "anybody", "device": "a device, for itself", LOCAL: "on this machine"}
        return f"| {' | '.join(shown)} | {words[need]} |" + " |" * len(ROLES)
    mark = "✓, within its scope" if scoped else "✓"
    marks = [mark if any(one == need for one in MAY[role]) else "" for role in ROLES]
    return f"| {' | '.join(shown)} | {need} | {' | '.join(marks)} |"


def page() -> str:
    """The page as it should be."""
    lines = [
        "## Operations",
        "",
        f"| operation | path | needs | {' | '.join(ROLES)} |",
        "|---" * (3 + len(ROLES)) + "|",
    ]
    for one in access.operations(module.router for module in ROUTERS):
        scoped = one.scoped and one.need != "read"
        lines.append(_row([f"`{one.name}`", f"{one.method} `{one.path}`"], one.need, scoped=scoped))
    lines += ["", "## Commands", "", f"| command | needs | {' | '.join(ROLES)} |", "|---" * (2 + len(ROLES)) + "|"]
    lines += [_row([f"`wherry {verb}`"], need) for verb, (need, _) in sorted(VERBS.items())]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
