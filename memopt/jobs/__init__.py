"""Work over data sets that one machine cannot hold, fragment by fragment, each exactly once."""
