"""Measurements, apart from the library: ratios within one run, never bare seconds."""
