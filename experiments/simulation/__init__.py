"""Runs and benchmarks whose engine is simulated: a model of a machine's time, and how far it is off."""
