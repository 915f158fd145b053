"""quantkit's ops inside servers."""
