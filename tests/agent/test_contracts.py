"""What applications rely on: declared by settings and handles, obeyed by the machine and by the handles themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.agent.builders import (
    INTERFACE,
    MODEL,
    confirmed,
    fetched,
    fresh,
    judged,
    now,
    offer,
    offered,
    on_trial,
    resolved,
    run,
)
from tests.agent.serving_kit import loadable, until
from tests.shared.engines import models
from wherry_agent import journal, machine
from wherry_agent import state as s
from wherry_agent.children import ServeModel
from wherry_agent.contracts import contract_of, preprocess_of, said_by
from wherry_agent.handle import Model
from wherry_agent.handle_server import HandleServer
from wherry_agent.status import describe, render
from wherry_shared.bundle import Contract, TensorSpec
from wherry_shared.errors import RefusedError

KEPT = Contract(inputs=INTERFACE.inputs, outputs=INTERFACE.outputs)
BROKEN = Contract(inputs=INTERFACE.inputs, outputs=[TensorSpec(name="boxes", datatype="FP32", shape=[1, 2])])


def declares(contract: Contract | None, by: Any = "application") -> s.Declares:
    return s.Declares(MODEL, contract, by)


def reasons_of(state: s.State) -> list[tuple[str, str]]:
    return [(report.state, report.reason) for report in machine.outgoing(state)]


def test_a_declared_contract_is_what_the_courier_checks() -> None:
    state, _ = run(fresh(), declares(BROKEN))
    assert journal.decode(journal.encode(state)) == state
    _, effects = run(state, offer(1, {MODEL: offered()}))
    (asked,) = [effect for effect in effects if isinstance(effect, s.Resolve)]
    assert (asked.contract, asked.contract_preprocess) == (BROKEN, None)


def test_the_operators_word_counts_before_an_applications_and_both_before_the_first_versions() -> None:
    state = confirmed()
    assert (contract_of(state, MODEL), said_by(state, MODEL)) == (INTERFACE, "first version")
    assert preprocess_of(state, MODEL) == ""
    state, _ = run(state, declares(BROKEN))
    assert (contract_of(state, MODEL), said_by(state, MODEL)) == (BROKEN, "application")
    named = msgspec.structs.replace(KEPT, preprocess="rgb")
    state, _ = run(state, declares(named, "settings"), declares(BROKEN))
    assert (contract_of(state, MODEL), said_by(state, MODEL)) == (named, "settings")
    assert preprocess_of(state, MODEL) == "rgb"
    state, _ = run(state, declares(None, "settings"))
    assert said_by(state, MODEL) == "first version"
    state, _ = run(state, declares(BROKEN), declares(None, "settings"))
    assert said_by(state, MODEL) == "application", "the settings withdraw only their own word"


def test_a_contract_asks_again_while_a_bundle_is_being_resolved() -> None:
    state, _ = run(fresh(), offer(1, {MODEL: offered()}))
    state, effects = run(state, declares(BROKEN))
    assert [type(effect) for effect in effects] == [s.Cancel, s.Resolve]
    assert isinstance(state.models[MODEL].phase, s.Resolving)
    _, effects = run(state, declares(BROKEN))
    assert effects == [], "saying it again changes nothing"


ON_ITS_WAY = [
    ("while it is downloaded", [resolved()]),
    ("in the canary", [resolved(), fetched()]),
    ("while it waits for room", [resolved(), s.TaskFailed(MODEL, offered().manifest, 1, "fetch", "disk_full", "")]),
]


@pytest.mark.parametrize(("sentence", "events"), ON_ITS_WAY, ids=[row[0].replace(" ", "_") for row in ON_ITS_WAY])
def test_a_bundle_on_its_way_that_breaks_it_is_let_go(sentence: str, events: list[s.Event]) -> None:
    before, _ = run(fresh(), offer(1, {MODEL: offered()}), *events)
    state, effects = run(before, declares(BROKEN))
    assert s.Cancel(MODEL) in effects
    assert reasons_of(state)[-1] == ("refused", "contract_broken")
    assert "outputs.boxes: gone" in machine.outgoing(state)[-1].detail
    state, effects = run(before, declares(KEPT))
    assert effects == []
    assert state.models == before.models


def test_a_candidate_on_trial_that_breaks_it_goes_back_and_is_not_held_to_be_bad() -> None:
    state = on_trial("1.1.0", state=confirmed(), serial=2)
    state, effects = run(state, declares(BROKEN))
    assert [e.models[0].active.target for e in effects if isinstance(e, s.Serve)] == [f"{MODEL}/1.0.0"]
    assert isinstance(state.models[MODEL].phase, s.Returning)
    assert state.models[MODEL].phase.reason == "contract_broken"
    assert state.known_bad == ()


def test_contracts_of_many_models_are_bounded() -> None:
    state = fresh()
    for number in range(70):
        state, _ = run(state, s.Declares(f"m{number}", KEPT, "application"))
    assert len(state.contracts) == 64
    assert "m69" in state.contracts
    assert "m0" not in state.contracts


def test_the_status_shows_contracts() -> None:
    state, _ = run(confirmed(), s.Declares("other", msgspec.structs.replace(KEPT, preprocess="rgb"), "settings"))
    shown = describe(state, now())
    assert shown["contracts"] == {
        MODEL: {"by": "first version", "inputs": {"x": "FP32 [1, 4]"}, "outputs": {"y": "FP32 [1, 2]"}},
        "other": {
            "by": "settings",
            "inputs": {"x": "FP32 [1, 4]"},
            "outputs": {"y": "FP32 [1, 2]"},
            "preprocess": "rgb",
        },
    }
    said = render({"running": False, **shown})
    assert "contract of other (by settings)" in said
    assert "preprocess rgb" in said


# --- handles -------------------------------------------------------------------------------------


def test_a_handle_tells_its_contract_and_runs_nothing_that_breaks_it(tmp_path: Path) -> None:
    told: list[tuple[str, Contract]] = []
    server = HandleServer(tmp_path / "h.sock", on_contract=lambda *said: told.append(said))
    good = loadable(models.scale(tmp_path / "a.onnx", 2.0))
    other = msgspec.structs.replace(good.interface.outputs[0], name="z")
    renamed = msgspec.structs.replace(good.interface, outputs=[other])
    server.publish("scale", ServeModel(name="scale", active=good))
    with Model("scale", socket=server._path, contract=good.interface, timeout_s=20) as model:
        until(lambda: told, "the contract is told")
        assert told[0][0] == "scale"
        assert told[0][1].inputs == good.interface.inputs
        changed = loadable(models.scale(tmp_path / "b.onnx", 3.0), "1.1.0")
        changed = msgspec.structs.replace(changed, interface=renamed, tensors={"z": "y"})
        server.publish("scale", ServeModel(name="scale", active=changed))
        until(lambda: server.settled("scale"), "the handle answers")
        assert model.served.version == "1.0.0", "what breaks the contract does not run here"
    with pytest.raises(RefusedError, match=r"outputs\.y: gone") as caught:
        Model("scale", socket=server._path, contract=good.interface, timeout_s=20)
    assert caught.value.code == "contract_broken"
    wanted = Contract(inputs=good.interface.inputs, outputs=[other], dims=good.interface.dims, preprocess="rgb")
    with pytest.raises(RefusedError, match=r"preprocess\.id: was 'rgb', now ''"):
        Model("scale", socket=server._path, contract=wanted, timeout_s=20)
    server.close()


def test_a_contract_that_is_none_is_refused(tmp_path: Path) -> None:
    server = HandleServer(tmp_path / "h.sock", on_contract=lambda *_: pytest.fail("it was taken"))
    spec = TensorSpec(name="x", datatype="FP32", shape=["n"])
    with pytest.raises(RefusedError, match="an axis 'n' that dims does not name") as caught:
        Model("scale", socket=server._path, contract=Contract(inputs=[spec], outputs=[spec]), timeout_s=20)
    assert caught.value.code == "contract_invalid"
    server.close()


def test_a_state_without_contracts_is_read_as_it_was() -> None:
    state = replace(judged_state(), contracts={})
    assert journal.decode(journal.encode(state)).contracts == {}


def judged_state() -> s.State:
    return run(fresh(), offer(1, {MODEL: offered()}), resolved(), fetched(), judged())[0]
