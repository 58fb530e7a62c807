"""exactprune."""
