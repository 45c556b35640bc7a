"""A figure: corruptions that norms do not show, against the spectral filter.

``python -m benchmarks.shell_attack`` draws ``docs/shell-attack.png``: honest rows from N(0, I),
a fraction of corrupt rows shifted by one standard deviation in every coordinate and scaled back
to the honest rows' shell, and the distance of each rule's result to the honest mean as the
dimension grows.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from fl_bgmd.aggregators import coordinate_median, geometric_median, mean, spectral_filter

DIMENSIONS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
RULES = {
    "mean": lambda rows, eps: mean(rows),
    "coordinate median": lambda rows, eps: coordinate_median(rows),
    "geometric median": lambda rows, eps: geometric_median(rows),
    "spectral filter": lambda rows, eps: spectral_filter(rows, byzantine_fraction=eps),
}


def corrupted(n: int, d: int, eps: float, seed: int) -> tuple[torch.Tensor, int]:
    """Return (n, d) rows of which the first ``floor(eps n)`` are corrupt, and their number."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    hostile = int(eps * n)
    rows[:hostile] += 1
    rows[:hostile] *= math.sqrt(d) / torch.linalg.vector_norm(rows[:hostile], dim=1, keepdim=True)
    return rows, hostile


def measure(n: int, eps: float, seeds: int) -> dict[str, list[float]]:
    """Return the mean error of each rule, and sigma_0 sqrt(eps), for each dimension."""
    errors: dict[str, list[float]] = {name: [] for name in (*RULES, "sigma")}
    for d in DIMENSIONS:
        found: dict[str, list[float]] = {name: [] for name in errors}
        for seed in range(seeds):
            rows, hostile = corrupted(n, d, eps, seed)
            honest = rows[hostile:].double()
            centered = honest - honest.mean(0)
            top = float(torch.linalg.eigvalsh(centered @ centered.T)[-1]) / len(honest)
            found["sigma"].append(math.sqrt(top * eps))
            for name, rule in RULES.items():
                vector = rule(rows, eps).vector.double()
                found[name].append(float(torch.linalg.vector_norm(vector - honest.mean(0))))
        for name, values in found.items():
            errors[name].append(float(np.mean(values)))
    return errors


def _path(text: str) -> Path:
    return Path(text).expanduser()


def main() -> None:
    """Measure, print and draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--eps", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=_path, default=Path("docs/shell-attack.png"))
    options = parser.parse_args()
    errors = measure(options.n, options.eps, options.seeds)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in RULES:
        # A filter that drops exactly the corrupt rows has no error at all: shown at the bottom.
        axes.loglog(DIMENSIONS, np.maximum(errors[name], 1e-2), marker="o", ms=4, label=name)
        print(f"{name:18}", " ".join(f"{value:9.3f}" for value in errors[name]))
    axes.loglog(DIMENSIONS, errors["sigma"], "k:", label=r"$\sigma_0 \sqrt{\epsilon}$, honest rows")
    print(f"{'sigma0 sqrt(eps)':18}", " ".join(f"{value:9.3f}" for value in errors["sigma"]))
    axes.set(
        xlabel="dimension d",
        ylabel="distance to the honest mean (0 shown as 0.01)",
        title=f"n = {options.n}, {options.eps:.0%} corrupt on the honest shell, "
        f"{options.seeds} seeds",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.output, dpi=150)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
