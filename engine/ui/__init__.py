"""A local page in the browser that edits a config and shows a run.

All logic for configs is in Python: the page sends the text of the editor to the local server, and
draws the reply.
"""
