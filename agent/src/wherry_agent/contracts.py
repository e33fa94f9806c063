"""What the applications of a device rely on, per model, and whether a bundle keeps it. Pure.

The operator's word (settings) counts first, then what an application declared last (`Model(name, contract=…)`), then the
interface of the first version that was confirmed here. What nobody states in a declared contract may change.
"""

from __future__ import annotations

from wherry_agent.state import Job, Slot, State
from wherry_shared.bundle import Contract, Interface, incompatibilities


def contract_of(state: State, name: str) -> Interface | None:
    """Return the contract of a model: a `Contract` if somebody declared one, else the first version's interface."""
    declared = state.contracts.get(name)
    if declared is not None:
        return declared.contract
    slot = state.models.get(name)
    return slot.contract if slot is not None else None


def preprocess_of(state: State, name: str) -> str | None:
    """Return the preprocess id that belongs to the contract of a model; None if nobody relies on one."""
    declared = state.contracts.get(name)
    if declared is not None:
        return declared.contract.preprocess
    return state.models.get(name, Slot()).contract_preprocess


def said_by(state: State, name: str) -> str:
    """Say whose word the contract of a model is; empty if there is none."""
    declared = state.contracts.get(name)
    if declared is not None:
        return declared.by
    slot = state.models.get(name)
    return "first version" if slot is not None and slot.contract is not None else ""


def broken_by(contract: Contract, job: Job) -> str:
    """Say where the bundle on its way breaks a declared contract; empty if it does not."""
    differences = incompatibilities(
        contract,
        job.loadable.interface,
        contract_preprocess=contract.preprocess,
        offered_preprocess=job.preprocess_id,
        declared=True,
    )
    return "; ".join(differences)
