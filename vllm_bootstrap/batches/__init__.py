"""Durable batches: files of requests, single items, and what carries them out. ``service`` is what others may call."""
