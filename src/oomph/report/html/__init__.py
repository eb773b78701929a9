"""Any record as one HTML page that needs nothing else: no network, no script, light and dark, on paper and on a phone."""
