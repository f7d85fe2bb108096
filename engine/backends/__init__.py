"""The libraries that train underneath an engine, one file each."""
