"""Laid out as NVIDIA's apex is, with its habits: see optimizers/."""
