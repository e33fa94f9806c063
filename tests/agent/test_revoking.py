"""A version that its publisher revoked after it came: what the machine does with it, wherever it stands."""

from __future__ import annotations

import pytest

from tests.agent.builders import (
    MODEL,
    confirmed,
    digest_of,
    fetched,
    last_serve,
    offer,
    offered,
    on_trial,
    resolved,
    run,
    served,
    trust,
)
from wherry_agent import revoking
from wherry_agent import state as s
from wherry_agent.state import Revocation, State
from wherry_shared import reasons


def manifest(version: str) -> str:
    return offered(version).manifest


def revoked(*versions: str, effect: str = "stop", model: str = MODEL) -> s.Refreshed:
    words = tuple(Revocation(model, manifest(version), effect) for version in versions)
    return s.Refreshed(trust(9), words)


def two() -> State:
    """1.0.0 was trusted before 1.1.0, which is trusted now."""
    return confirmed("1.1.0", state=confirmed("1.0.0"), serial=2)


def test_what_is_watched_is_all_that_is_here_and_the_candidate():
    state = on_trial("1.2.0", state=two(), serial=3)
    assert revoking.watched(state) == {MODEL: sorted(manifest(one) for one in ("1.0.0", "1.1.0", "1.2.0"))}


def test_replace_lets_what_serves_go_on():
    before = two()
    state, effects = run(before, revoked("1.0.0", "1.1.0", effect="replace"))
    assert state.models == before.models
    assert not [effect for effect in effects if isinstance(effect, s.Serve)]


def test_stop_goes_back_to_the_version_before():
    state, effects = run(two(), revoked("1.1.0"))
    slot = state.models[MODEL]
    assert slot.incumbent is not None
    assert slot.incumbent.manifest == manifest("1.0.0")
    assert [one.active.manifest for one in last_serve(effects).models] == [manifest("1.0.0")]
    assert slot.held is None


@pytest.mark.parametrize("words", [("1.0.0", "1.1.0"), ("1.1.0", "1.0.0")])
def test_stop_leaves_none_where_the_version_before_is_revoked_too(words: tuple[str, str]):
    state, effects = run(two(), revoked(*words))
    slot = state.models[MODEL]
    assert (slot.incumbent, slot.last_good, slot.held) == (None, None, None)
    assert isinstance(slot.phase, s.Safe)
    assert slot.phase.reason == reasons.REVOKED
    assert last_serve(effects).models == ()
    again, effects = run(state, s.Tick(), ms=10 * 24 * 3600_000)
    assert isinstance(again.models[MODEL].phase, s.Safe), "nothing revoked is tried again by itself"
    assert not [effect for effect in effects if isinstance(effect, s.Resolve)]


def test_a_revoked_former_version_is_nothing_to_go_back_to():
    state, _ = run(two(), revoked("1.0.0"))
    slot = state.models[MODEL]
    assert slot.incumbent is not None
    assert (slot.incumbent.manifest, slot.last_good) == (manifest("1.1.0"), None)


@pytest.mark.parametrize("effect", ["replace", "stop"])
def test_a_candidate_that_is_revoked_in_its_trial_goes_back(effect: str):
    state, effects = run(on_trial("1.2.0", state=two(), serial=3), revoked("1.2.0", effect=effect))
    assert isinstance(state.models[MODEL].phase, s.Returning)
    assert [one.active.manifest for one in last_serve(effects).models] == [manifest("1.1.0")]
    state, _ = run(state, served(state, "1.1.0"))
    assert isinstance(state.models[MODEL].phase, s.Idle)


def test_a_candidate_on_its_way_is_refused():
    state, _ = run(two(), offer(3, {MODEL: offered("1.2.0")}), resolved("1.2.0"))
    state, effects = run(state, revoked("1.2.0", effect="replace"))
    assert s.Cancel(MODEL) in effects
    assert isinstance(state.models[MODEL].phase, s.Idle)
    late, _ = run(state, fetched("1.2.0"))
    assert late.models == state.models


def test_a_word_about_what_is_not_here_changes_nothing():
    before = two()
    state, _ = run(before, revoked("9.9.9"), s.Refreshed(trust(9), (Revocation("other", digest_of("x"), "stop"),)))
    assert state.models == before.models


def test_the_safe_state_ends_with_a_good_version():
    state, _ = run(two(), revoked("1.0.0", "1.1.0"))
    state = confirmed("1.2.0", state=state, serial=5)
    incumbent = state.models[MODEL].incumbent
    assert incumbent is not None
    assert incumbent.manifest == manifest("1.2.0")
