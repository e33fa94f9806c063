"""Local serving: the Open Inference Protocol, version 2, over HTTP on loopback and a unix socket."""
