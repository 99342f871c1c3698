"""The Ray Serve application over an exported version."""
