"""The arithmetic: records in, records out; numpy at most, never torch."""
