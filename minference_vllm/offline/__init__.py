"""Tools outside of serving: checkpoint configuration, captured layers, calibration, evaluation, plots."""
