"""What people look at: previews, plots, the schedule catalog, problem reports."""
