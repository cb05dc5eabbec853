"""Learning rates that fall by themselves, beside schedules with a known end and other rules."""
