"""Present results to users: previews, plots, the list of schedules, and problem reports."""
