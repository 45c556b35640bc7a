"""Every attack by its kebab-case name, with what it knows, its knob and where it comes from."""

from torch import Tensor

from fl_bgmd.plugins import is_path, load_object

from . import collusion, data, updates
from .base import Attack, View
from .search import honest_mean, searched

_BGMD = "Acharya et al. (BGMD), Section 7"


def _honest(view: View) -> Tensor:
    assert view.honest is not None
    return view.honest


def _colluders(view: View) -> Tensor:
    assert view.colluders is not None
    return view.colluders


def _mimic(view: View) -> Tensor:
    """Return the victim's update: always the same client's, as long as it answers."""
    honest, colluders = _honest(view), _colluders(view)
    known: dict[int, Tensor] = dict(
        zip((*view.honest_ids, *view.colluder_ids), (*honest, *colluders), strict=True)
    )
    victim = view.memory.get("victim")
    if victim not in known:
        victim = view.honest_ids[collusion.mimic_victim(honest)]
        view.memory.setdefault("victim", victim)
    return known[victim]


def _memory_takeover(view: View, strength: float) -> Tensor:
    honest, running = _honest(view), honest_mean(view)

    def lie(scale: float) -> Tensor:
        return collusion.memory_takeover(honest, running, scale)

    return lie(strength or searched(view, lie, (0.5, 1.0, 3.0, 10.0, 30.0, 100.0)))


def _memory_consistent(view: View, strength: float) -> Tensor:
    honest, running = _honest(view), honest_mean(view)

    def lie(scale: float) -> Tensor:
        return collusion.memory_consistent(honest, running, scale)

    return lie(strength or searched(view, lie, (0.25, 0.5, 1.0, 2.0, 5.0, 20.0)))


def _fang(view: View, strength: float) -> Tensor:
    honest = _honest(view)

    def lie(beyond: float) -> Tensor:
        return collusion.directed_deviation(honest, beyond)

    return lie(strength or searched(view, lie, (1.0, 1.25, 2.0, 5.0), blind=2.0))


_UPDATE_ATTACKS = (
    Attack(
        "bit-flip",
        _BGMD,
        knob="factor",
        strength=100.0,
        authors_code={"": 5.0},
        sweep=(1.5, 5.0, 100.0),
        apply=lambda view, s: updates.bit_flip(view.update, s),
    ),
    Attack(
        "gaussian",
        _BGMD,
        knob="standard deviation",
        strength=10.0,
        authors_code={"cifar10": 100.0},
        sweep=(0.01, 0.1, 10.0),
        apply=lambda view, s: updates.gaussian(view.update, s, view.generator),
    ),
    Attack(
        "replace-gaussian",
        "Blanchard et al. (NeurIPS 2017), Section 5",
        knob="standard deviation",
        strength=200.0,
        sweep=(0.01, 0.1, 10.0, 200.0),
        apply=lambda view, s: updates.replace_gaussian(view.update, s, view.generator),
    ),
    Attack(
        "ascent",
        "Ghosh et al., Section 8",
        knob="eps",
        strength=0.9,
        sweep=(0.5, 0.9, 2.0),
        apply=lambda view, s: updates.ascent(view.update, s),
    ),
    Attack(
        "sign-flip",
        "Li et al. (AAAI 2019)",
        apply=lambda view, _: updates.sign_flip(view.update),
    ),
    Attack("zero", "common", apply=lambda view, _: updates.zero(view.update)),
    Attack(
        "random",
        "common",
        knob="length relative to the update",
        strength=1.0,
        sweep=(1.0, 10.0),
        apply=lambda view, s: updates.random(view.update, s, view.generator),
    ),
    Attack("nan", "common", apply=lambda view, _: updates.nan(view.update)),
    Attack("inf", "ByzFL", apply=lambda view, _: updates.inf(view.update)),
    Attack(
        "huge",
        "this project",
        knob="absolute value",
        strength=updates.HUGE,
        sweep=(1e6, updates.HUGE),
        apply=lambda view, s: updates.huge(view.update, s),
    ),
    Attack(
        "free-rider",
        "Fraboni et al. (AISTATS 2021)",
        apply=lambda view, _: updates.zero(view.update),
    ),
    Attack(
        "delayed",
        "common",
        knob="rounds",
        strength=5.0,
        sweep=(1.0, 5.0),
        remembers=True,
        apply=lambda view, _: updates.delayed(view.update, view.past),
    ),
    Attack(
        "block-hijack",
        "this project",
        knob="value",
        strength=1e4,
        sweep=(0.01, 1.0, 1e4),
        apply=lambda view, s: updates.block_hijack(view.update, s),
    ),
    Attack(
        "alie",
        "Baruch et al. (NeurIPS 2019), Algorithm 3",
        knows="colluders",
        knob="z; 0: the paper's, from n and f",
        sweep=(0.0, 1.5),
        apply=lambda view, s: collusion.alie(
            _colluders(view), view.num_clients, s, num_byzantine=view.num_byzantine
        ),
    ),
    Attack(
        "ipm",
        "Xie et al. (UAI 2019), Equation 1",
        knows="all",
        knob="eps",
        strength=0.5,
        sweep=(0.1, 0.5, 10.0),
        apply=lambda view, s: collusion.ipm(_honest(view), s),
    ),
    Attack(
        "mimic",
        "Karimireddy et al. (ICLR 2022), Section 5",
        knows="all",
        remembers=True,
        apply=lambda view, _: _mimic(view),
    ),
    Attack(
        "min-max",
        "Shejwalkar and Houmansadr (NDSS 2021), Equation 5",
        knows="all",
        knob="multiple of the largest gamma",
        strength=1.0,
        sweep=(1.0, 3.0),
        apply=lambda view, s: collusion.min_max(_honest(view), s),
    ),
    Attack(
        "min-sum",
        "Shejwalkar and Houmansadr (NDSS 2021), Equation 6",
        knows="all",
        knob="multiple of the largest gamma",
        strength=1.0,
        sweep=(1.0, 3.0),
        apply=lambda view, s: collusion.min_sum(_honest(view), s),
    ),
    Attack(
        "memory-poison",
        "this project",
        knows="all",
        knob="factor",
        strength=100.0,
        sweep=(1.0, 10.0, 100.0),
        apply=lambda view, s: collusion.memory_poison(_honest(view), s),
    ),
    Attack(
        "memory-takeover",
        "this project",
        knows="rule",
        knob="factor; 0: searched",
        sweep=(0.0, 10.0),
        remembers=True,
        apply=_memory_takeover,
    ),
    Attack(
        "memory-consistent",
        "this project",
        knows="rule",
        knob="length relative to the median update; 0: searched",
        sweep=(0.0, 1.0),
        remembers=True,
        apply=_memory_consistent,
    ),
    Attack(
        "fang",
        "Fang et al. (USENIX Security 2020), Section 4.2",
        knows="rule",
        knob="multiple of the honest extreme, 1 or more; 0: searched (2 without the rule)",
        sweep=(0.0, 2.0),
        remembers=True,
        apply=_fang,
    ),
)


_DATA_ATTACKS = (
    Attack(
        "backdoor",
        _BGMD,
        "data",
        knob="target label",
        strength=8.0,
        authors_code={"": 0.0},
        sweep=(1.0, 8.0),
        corrupt=lambda images, labels, s, classes, rng: (images, data.backdoor(labels, int(s))),
    ),
    Attack(
        "label-shift",
        "Ghosh et al., Section 8 (9 - y)",
        "data",
        corrupt=lambda images, labels, s, classes, rng: (
            images,
            data.label_shift(labels, classes),
        ),
    ),
    Attack(
        "random-labels",
        "Ghosh et al., Section 8",
        "data",
        corrupt=lambda images, labels, s, classes, rng: (
            images,
            data.random_labels(labels, classes, rng),
        ),
    ),
    Attack(
        "image-noise",
        _BGMD,
        "data",
        knob="standard deviation of 255 grey levels",
        strength=10.0,
        sweep=(10.0, 100.0),
        corrupt=lambda images, labels, s, classes, rng: (
            data.image_noise(images, s, rng),
            labels,
        ),
    ),
    Attack(
        "impulse",
        _BGMD,
        "data",
        knob="share of the pixels",
        strength=0.9,
        sweep=(0.5, 0.9),
        corrupt=lambda images, labels, s, classes, rng: (data.impulse(images, s, rng), labels),
    ),
    Attack(
        "blur",
        "Acharya et al. (BGMD), Figure 4",
        "data",
        knob="sigma in pixels",
        strength=2.0,
        sweep=(2.0, 4.0),
        corrupt=lambda images, labels, s, classes, rng: (data.blur(images, s), labels),
    ),
)


class _Registry(dict[str, Attack]):
    """Attacks by name; ``package.module:NAME`` is one of somebody's own."""

    def __missing__(self, name: str) -> Attack:
        if not is_path(name):
            raise KeyError(name)
        attack = load_object(name)
        if not isinstance(attack, Attack):
            raise ValueError(f"{name} is a {type(attack).__name__}; allowed: an Attack")
        return attack


ATTACKS: dict[str, Attack] = _Registry(
    {attack.name: attack for attack in (*_UPDATE_ATTACKS, *_DATA_ATTACKS)}
)
"""Attacks by name. ``ATTACKS["package.module:NAME"]`` imports an :class:`Attack` of your own."""


def is_attack(name: str) -> bool:
    """Whether there is an attack of that name.

    Raises ``ValueError`` for a ``package.module:NAME`` that cannot be imported or is no
    :class:`Attack`.
    """
    return name in ATTACKS or (is_path(name) and ATTACKS[name] is not None)
