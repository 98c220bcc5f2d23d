"""Calibration files: what a model is asked, and the file made of what it answers."""
