"""Eviction policies: which entries of a paged KV cache stay when a request outgrows its budget.

`registry.make(name, options)` builds a `policy.Policy`; it scores the entries of one `event.Event`. How much may stay
(`budget`) and what must stay (`protection`) hold for every policy alike. This module imports nothing, so that budget,
protection and registry stay usable where there is no torch.
"""
