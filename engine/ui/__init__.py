"""A local page in the browser that edits a config and follows a run."""
