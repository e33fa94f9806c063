"""HTTP routers. Every module here that has a `router` is part of the API."""
