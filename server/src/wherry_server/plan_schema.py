"""The JSON schema of plan files, made from the types that parse plans, so that editors know what a plan may say."""

from __future__ import annotations

from typing import Any

import msgspec

from wherry_server.plan import Plan

TARGET = {
    "cohort": "a saved cohort",
    "selector": 'a selector, such as "all"',
    "device": "one device, by id or name",
}
"""Whom a rollout is for: one of these."""


def wish_schema() -> dict[str, Any]:
    """Return the schema of what `POST /rollouts` and plan files take: a plan whose manifests the server looks up."""
    _, parts = msgspec.json.schema_components([Plan], ref_template="#/$defs/{name}")
    plan, model = parts.pop("Plan"), parts["PlannedModel"]
    model["properties"].pop("manifest")
    model["required"].remove("manifest")
    added = {*TARGET, "value"}
    properties = {name: value for name, value in plan["properties"].items() if name not in added}
    properties.update({name: {"type": "string", "description": text} for name, text in TARGET.items()})
    properties["start"] = {"type": "boolean", "description": "start it at once", "default": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Plan of a rollout",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": parts,
    }
