"""The HTTP side of the service: what requests and answers look like, and the routes."""
