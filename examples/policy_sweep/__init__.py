"""Short trainings with several policies: which accuracy each gives in which time (docs/sweep.md)."""
