"""How a run is saved in files, and continued as if nothing had happened."""
