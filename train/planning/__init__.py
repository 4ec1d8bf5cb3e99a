"""Compiles training steps for devices that this machine need not have."""
