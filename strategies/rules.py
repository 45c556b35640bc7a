"""The strategies by name: each is its rule with the options of all strategies."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from fl_bgmd.options import OptionError

from .robust import RobustStrategy

if TYPE_CHECKING:
    from .typed import (
        BGMDOptions,
        CenteredClippingOptions,
        DnCOptions,
        FLAMEOptions,
        FoolsGoldOptions,
        GMDOptions,
        MultiKrumOptions,
        NormClippingOptions,
        NormThresholdOptions,
        RobustFilterOptions,
        SignGuardOptions,
        StrategyOptions,
        TrimmedMeanOptions,
    )


class Mean(RobustStrategy):
    """Average the clients' updates: FedAvg with screened replies. Tolerates no hostile client."""

    spec = "mean"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[StrategyOptions]) -> None: ...


class GMD(RobustStrategy):
    """Geometric median descent (GmD): Table 1 of Acharya et al. (BGMD).

    The median is certified: each round reports its relative ``gap`` to the optimum.
    """

    spec = "gmd"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[GMDOptions]) -> None: ...


class BGMD(RobustStrategy):
    """Block coordinate geometric median descent (BGmD): Algorithms 1 and 2 of Acharya et al.

    Each round aggregates a block of the coordinates and keeps the rest in a memory. The default
    memory is this project's: the printed ones let attacks in and diverge where clients train far in
    a round (see :func:`fl_bgmd.aggregators.block_geometric_median`).
    """

    spec = "bgmd"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[BGMDOptions]) -> None: ...


class QBGMD(BGMD):
    """BGMD whose clients send quantized updates: the slides' QBGMD.

    Lemma 4: with C_k the choice of the block and Q_s a quantizer, ``C_k(Q_s(x))`` contracts like
    C_k alone with ``delta = (1 - beta_{k,s}) k / d``, so the theorems of BGMD hold. Clients need
    :class:`fl_bgmd.mods.CompressionMod`; by default they keep nothing of what is lost.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"compressor": "qsgd", "error_feedback": False}

    def __init__(self, **options: "Unpack[BGMDOptions]") -> None:
        if options.get("compressor") == "none":
            raise OptionError("compressor is 'none'; allowed: a compressor")
        super().__init__(**options)


class FedBGMD(QBGMD):
    """QBGMD over several local steps: the slides' FL-BGMD, Algorithm 3.

    Clients train locally and send ``c_i = Q(x_t - y_i)`` (line 11); the server forms
    ``P = G + M`` (line 24), chooses a block of it (line 25), keeps the rest in its memory (line 26)
    and moves the model by the geometric median of the block (lines 27 and 28). The printed memory
    has a row for each client, ``memory="per-client"``, which lets redrawn attackers in and
    diverges where clients train far in a round; the default is this project's, whose robust
    location of the ``c_i`` takes the place of the rows.
    """


class CMD(RobustStrategy):
    """Coordinate-wise median descent (CmD): Table 1 of Acharya et al. (BGMD), after Yin et al."""

    spec = "cmd"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[StrategyOptions]) -> None: ...


class TrimmedMean(RobustStrategy):
    """Coordinate-wise trimmed mean of Yin et al."""

    spec = "trimmed-mean"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[TrimmedMeanOptions]) -> None: ...


class NormThreshold(RobustStrategy):
    """Drop the updates of largest norm, average the rest: Algorithms 1 and 2 of Ghosh et al.

    With ``compressor=`` and ``error_feedback=False`` it is their Algorithm 1, with error feedback
    their Algorithm 2.
    """

    spec = "norm-threshold"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[NormThresholdOptions]) -> None: ...


class RobustFilter(RobustStrategy):
    """Filter the updates that stretch their covariance: Algorithm 3 of Data and Diggavi.

    Proved for hostile shares of up to 1/4.
    """

    spec = "robust-filter"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[RobustFilterOptions]) -> None: ...


class Krum(RobustStrategy):
    """Follow the one update with the closest neighbors: Krum of Blanchard et al."""

    spec = "krum"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[StrategyOptions]) -> None: ...


class MultiKrum(RobustStrategy):
    """Average the updates with the closest neighbors: Multi-Krum of Blanchard et al."""

    spec = "multi-krum"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[MultiKrumOptions]) -> None: ...


class CenteredClipping(RobustStrategy):
    """Clip the updates around the previous aggregate: Karimireddy et al. (ICML 2021)."""

    spec = "centered-clipping"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[CenteredClippingOptions]) -> None: ...


class Bulyan(RobustStrategy):
    """Select updates by Krum, average around their median: Bulyan of El Mhamdi et al."""

    spec = "bulyan"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[StrategyOptions]) -> None: ...


class NormClipping(RobustStrategy):
    """Scale long updates down and average: norm clipping, after Sun et al."""

    spec = "norm-clip"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[NormClippingOptions]) -> None: ...


class DnC(RobustStrategy):
    """Leave out what stands out in random coordinates: DnC of Shejwalkar and Houmansadr."""

    spec = "dnc"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[DnCOptions]) -> None: ...


class SignGuard(RobustStrategy):
    """Keep updates of ordinary norm and signs: SignGuard of Xu et al."""

    spec = "sign-guard"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[SignGuardOptions]) -> None: ...


class FoolsGold(RobustStrategy):
    """Distrust clients that are alike over the rounds: FoolsGold of Fung et al."""

    spec = "fools-gold"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[FoolsGoldOptions]) -> None: ...


class FLAME(RobustStrategy):
    """Keep the majority that points the same way, clip it: FLAME of Nguyen et al."""

    spec = "flame"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[FLAMEOptions]) -> None: ...


class FLTrust(RobustStrategy):
    """Trust updates as far as the server's own data agree: FLTrust of Cao et al.

    The server's own update is that of ``root_update``, a function from the arrays of the model and
    the round to the arrays that the server has trained on data that it trusts, the way that clients
    train.
    """

    spec = "fltrust"

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[StrategyOptions]) -> None: ...
