"""Output for users: previews, plots, the schedule catalog and problem reports."""
