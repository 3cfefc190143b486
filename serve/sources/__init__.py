"""Where weights come from: one module per source, each `(reference, …) -> Offer`, one downloader.

A source says what it holds (an Offer: files, sizes, hashes) without fetching it, so that what
cannot run is never downloaded. Knows no torch and no requests. Called by loader.py.
"""
