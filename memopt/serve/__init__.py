"""``memopt serve``: bundles behind HTTP, by the routes that clients already speak."""
