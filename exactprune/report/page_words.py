"""The sentences of a report: how each verdict is proved, why each neuron may go or stays. Words only, no computing."""

from __future__ import annotations

from exactprune.claim import Method, Status

STATUS = {
    Status.INACTIVE: "stably inactive: its pre-activation is never above 0, so it outputs 0",
    Status.ACTIVE: "stably active: its pre-activation is never below 0, so the ReLU does nothing",
    Status.UNSTABLE: "unstable: positive for one input of the domain, negative for another",
    Status.UNKNOWN: "unknown: none of these is proved",
}

_STABLE = {
    Method.INTERVAL: "interval arithmetic, layer by layer, keeps its pre-activation on one side of 0",
    Method.CROWN: "a linear bound through the network (CROWN) keeps its pre-activation on one side of 0",
    Method.ALPHA_CROWN: "a linear bound with optimised slopes (alpha-CROWN) keeps its pre-activation on one side of 0",
    Method.INPUT_SPLIT: "the domain was split into smaller boxes, and bounds hold on each of them",
    Method.BRANCH_AND_BOUND: "cases of on and off neurons were told apart (branch and bound), and bounds hold in each case",
    Method.LP: "the duals of a linear program are turned into a linear bound",
    Method.MILP: "an integer program suggested it, and a tree of linear bounds proves it",
    Method.SCALING_UP: "the ScalingUp formulation suggested it, and a tree of linear bounds proves it",
    Method.LEO: "the LEO formulation suggested it, and a tree of linear bounds proves it",
}
_WITNESSES = {
    Method.CORNER: "corners of the domain", Method.SAMPLE: "random inputs of the domain",
    Method.DATA: "the inputs given with the run", Method.ASCENT: "inputs found by gradient ascent",
}

RULES = {
    "inactive": "it outputs 0 for every input of the domain, so dropping it changes nothing",
    "zero": "it outputs 0 for every input of the domain, so dropping it changes nothing",
    "constant": "its output is the same number for every input of the domain, and the next layer's bias took it over",
    "unread": "nothing that reaches an output reads it with a non-zero weight",
    "linear": "its layer's neurons are on for every input of the domain, so their ReLU does nothing and went",
    "duplicate": "it is a positive multiple of another neuron, which took its outgoing weights over",
    "dependence": "it is on for every input of the domain and an exact combination of others that are, which took it over",
    "merge": "it is on for every input of the domain, so it is linear there; fewer linear units stand for it and others",
    "fold": "every neuron of its layer is linear on the domain; the layer was folded into the next one",
    "opposite": "it is a negative multiple of another neuron, which together with a linear unit stands for it",
    "forward": "wherever it is active, everything that reads it is off, with it and without it",
    "relax": "it is so nearly linear on the domain that a linear unit stands for it, with a certified deviation",
}

KEPT = {
    "unknown": "nothing is proved about it, and nothing is ever removed on unknown",
    "unstable": "it switches between on and off within the domain, and nothing smaller was found to stand for it",
    "partial": "it is off, but other positions of its channel are not, and a channel leaves as a whole",
    "coupled": "it is off, but it is tied to others that are not (a skip connection, a group, or the interface)",
    "part": "it is on, but other positions of its channel are not, and a channel is rewritten as a whole",
    "active": "it is on for every input of the domain, but no smaller stand-in was found within the allowed deviation",
}

MAY = {
    "removable": "it outputs 0 for every input of the domain: compress drops it where nothing ties it to others that are not",
    "mergeable": "it is linear on the domain: compress merges it with others like it, where fewer units do",
    "switches": "it switches between on and off within the domain, so the network uses its ReLU there",
}


def proof_of(status: Status, method: Method) -> str:
    """How a verdict is proved, as part of a sentence."""
    if status is Status.UNKNOWN:
        return "not proved"
    if status is Status.UNSTABLE:
        found = _WITNESSES.get(method, f"inputs found by {method.word}")
        return f"two inputs with both signs are recorded and checked exactly: {found}"
    return _STABLE.get(method, f"{method.word or 'a certificate'} keeps its pre-activation on one side of 0")


def gone_because(rule: str, level: str) -> str:
    """Why a removed neuron may go, with the level at which that holds."""
    why = RULES.get(rule, f"the rule {rule} removes it")
    return f"{why} ({level})" if level else why
