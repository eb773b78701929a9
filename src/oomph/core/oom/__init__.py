"""Reports of memory that ran out: what they say, which tensor has that size, why it did not fit, and what helps."""
