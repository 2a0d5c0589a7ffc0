"""The commands that measure: each file holds one's settings, its work, and what it prints."""
