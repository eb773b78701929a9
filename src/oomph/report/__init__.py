"""Reports: any record as text for a person."""
