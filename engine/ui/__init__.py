"""Local web pages: a config editor and a page that shows runs.

All logic for configs is in Python: the config page sends the text in the editor to the local
server, and displays the reply.
"""
