"""What is taken out of texts, who may read what is kept, who did, and what leaves the disk."""
