"""Speed, measured where the user stands."""
