import zipage  # noqa: F401  (before torch: see `zipage/threads.py`)
