"""A laboratory of attacks, and who runs them when."""

from .attack import (
    ATTACKS,
    Attack,
    Bound,
    Strength,
    attack,
    base_name,
    build_attacks,
)
from .plan import AttackPlan
from .roles import SELECTIONS, byzantine_clients, byzantine_roles
from .view import OMNISCIENT, Pipeline, View

# isort: split
# In the order in which they are listed.
from .updates import (
    ascent,
    bit_flip,
    block_hijack,
    delayed,
    free_rider,
    gaussian,
    huge,
    inf,
    nan,
    random,
    replace_gaussian,
    sign_flip,
    zero,
)

# isort: split
from .collusion import (
    alie,
    alie_deviations,
    balanced_rows,
    ipm,
    mimic,
    mimic_victim,
    min_max,
    min_sum,
    other_world,
)

# isort: split
from .block_memory import (
    consistent_lie,
    memory_consistent,
    memory_poison,
    memory_takeover,
    takeover_lie,
)

# isort: split
from .directed import (
    directed_deviation,
    disguised,
    fang,
    fang_krum,
    krum_deviation,
    two_groups,
)

# isort: split
from .optimal import optimal_alie, optimal_ipm, optimal_min_max

# isort: split
from .history import consistent, rop, signs_of

# isort: split
from .data import backdoor, blur, image_noise, impulse, label_shift, random_labels

# isort: split
from .backdoors import badnets, bars, dba, label_flip, model_replacement, patch

__all__ = [
    "ATTACKS",
    "OMNISCIENT",
    "SELECTIONS",
    "Attack",
    "AttackPlan",
    "Bound",
    "Pipeline",
    "Strength",
    "View",
    "alie",
    "alie_deviations",
    "ascent",
    "attack",
    "backdoor",
    "badnets",
    "balanced_rows",
    "bars",
    "base_name",
    "bit_flip",
    "block_hijack",
    "blur",
    "build_attacks",
    "byzantine_clients",
    "byzantine_roles",
    "consistent",
    "consistent_lie",
    "dba",
    "delayed",
    "directed_deviation",
    "disguised",
    "fang",
    "fang_krum",
    "free_rider",
    "gaussian",
    "huge",
    "image_noise",
    "impulse",
    "inf",
    "ipm",
    "krum_deviation",
    "label_flip",
    "label_shift",
    "memory_consistent",
    "memory_poison",
    "memory_takeover",
    "mimic",
    "mimic_victim",
    "min_max",
    "min_sum",
    "model_replacement",
    "nan",
    "optimal_alie",
    "optimal_ipm",
    "optimal_min_max",
    "other_world",
    "patch",
    "random",
    "random_labels",
    "replace_gaussian",
    "rop",
    "sign_flip",
    "signs_of",
    "takeover_lie",
    "two_groups",
    "zero",
]
