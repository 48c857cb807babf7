"""Optimisers and schedules that torch lacks."""
