"""Launchers for TPU VMs, GKE, XPK and Slurm."""
