"""Meshes and sharding rules, and the processes of a job."""
