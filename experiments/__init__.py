import zipage  # noqa: F401  (before torch, whichever module is run: see `zipage/threads.py`)
