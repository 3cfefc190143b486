"""How a folder's weights are held once they are loaded: as they are, in 4 bits, in 8, or unpacked.

`plan` decides from a config what will be done and what it costs, before anything is loaded; the
other modules do it. Knows no hubs and no requests. Called by loader.py.
"""
