"""The Ray Serve application that serves an exported version."""
