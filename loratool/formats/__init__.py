"""Adapter file formats: names and metadata to and from the one Adapter. Nothing here opens a file or imports torch."""
