"""Local web pages, one to edit a config and one to show runs.

All logic for configs is in Python: the config page sends the text in the editor to the local
server, and displays the reply.
"""
