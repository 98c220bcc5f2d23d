"""Tensor parallelism: one process a rank, and what stands for them in the process that schedules."""
