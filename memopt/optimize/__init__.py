"""Find the fastest right variant on this machine, and remember it in the bundle."""
