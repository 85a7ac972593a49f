"""Cases, the data gate, files on the native grid, the cache and the loaders."""
