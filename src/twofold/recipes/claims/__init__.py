"""The nine effects the recipe must show, each judged by a protocol that was fixed before the runs that count.

``declared`` has the protocols, docs/claims.md shows them. A claim whose arm a run lacks is not judged, which is never
an error; one whose arms were not equal is refused (``fairness``). One run is judged here over its items; ``seeds`` puts
several together. Nothing is trained, chosen or drawn here. Imports no torch.
"""

from __future__ import annotations

from twofold.recipes.claims.general import general_rl
from twofold.recipes.claims.modes import both_modes, mode_following, thinking_budget
from twofold.recipes.claims.pretrained import moe_balance, pretraining
from twofold.recipes.claims.reasoning import rl_gain, thinking_gain
from twofold.recipes.claims.students import distillation
from twofold.recipes.evidence import Facts
from twofold.report.model import Claim


def judge(facts: Facts) -> list[Claim]:
    """All nine claims about one run, what the finished model does first."""
    return [
        thinking_gain(facts),
        both_modes(facts),
        rl_gain(facts),
        mode_following(facts),
        general_rl(facts),
        thinking_budget(facts),
        distillation(facts),
        pretraining(facts),
        moe_balance(facts),
    ]
