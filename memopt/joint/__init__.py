"""One vector for what was seen, heard and read together: trained, exported, run."""
