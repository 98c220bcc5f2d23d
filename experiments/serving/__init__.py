"""Servers of the OpenAI interface under load: started, driven over HTTP from processes of their own, and stopped.

The load comes from the standard library alone, so that a client starts in a moment and costs little (`stream.py`).
"""
