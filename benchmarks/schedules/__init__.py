"""Automatic reductions of the learning rate against schedules with a known end and other rules."""
