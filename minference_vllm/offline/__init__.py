"""What runs outside of serving: a checkpoint's configuration, captured layers, calibration, plots."""
