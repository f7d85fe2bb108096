"""A local page in the browser that edits a config and shows a run.

Everything that knows configs is Python: the page sends the text of the editor and draws the reply.
"""
