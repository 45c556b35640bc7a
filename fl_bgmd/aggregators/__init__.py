"""Robust aggregation rules: pure functions of an (n, d) tensor of updates."""

from .around_median import bulyan, mean_around_median
from .block import block_geometric_median
from .clipping import centered_clipping
from .coordinates import coordinate_median, trimmed_mean
from .geometric_median import geometric_median
from .mean import mean
from .memory import BlockMemory
from .mixing import bucketing, nearest_neighbor_mixing
from .norms import norm_clip, norm_threshold, project
from .outliers import covariance_agnostic_filter, divide_and_conquer, gap_filter
from .results import Aggregate, BlockGeometricMedian, FilteredAggregate, GeometricMedian
from .rule import MIXINGS, RECOMMENDED, RULES, Rule, build_mixings, build_rule, mixing, rule
from .selection import krum, multi_krum
from .signs import sign_guard
from .similarity import flame, fools_gold
from .spectral import SpectralFilter, spectral_filter, theoretical_sigma0
from .subsets import minimum_diameter_averaging, smallest_eigenvalue_averaging
from .trust import fltrust, nearest_neighbor_averaging

__all__ = [
    "MIXINGS",
    "RECOMMENDED",
    "RULES",
    "Aggregate",
    "BlockGeometricMedian",
    "BlockMemory",
    "FilteredAggregate",
    "GeometricMedian",
    "Rule",
    "SpectralFilter",
    "block_geometric_median",
    "bucketing",
    "build_mixings",
    "build_rule",
    "bulyan",
    "centered_clipping",
    "coordinate_median",
    "covariance_agnostic_filter",
    "divide_and_conquer",
    "flame",
    "fltrust",
    "fools_gold",
    "gap_filter",
    "geometric_median",
    "krum",
    "mean",
    "mean_around_median",
    "minimum_diameter_averaging",
    "mixing",
    "multi_krum",
    "nearest_neighbor_averaging",
    "nearest_neighbor_mixing",
    "norm_clip",
    "norm_threshold",
    "project",
    "rule",
    "sign_guard",
    "smallest_eigenvalue_averaging",
    "spectral_filter",
    "theoretical_sigma0",
    "trimmed_mean",
]
