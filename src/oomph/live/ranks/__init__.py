"""One exact step over several processes, one on each device: what they share, and what they do when one runs out of memory."""
