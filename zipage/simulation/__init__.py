"""The engine without its device: real scheduling under a modelled time."""
