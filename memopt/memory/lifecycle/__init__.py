"""How a store stays small and whole: consolidation, retention, tiers, checks."""
