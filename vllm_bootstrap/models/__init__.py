"""Models by name: the catalogue, loading on demand, making room, weights on disk, adapters."""
