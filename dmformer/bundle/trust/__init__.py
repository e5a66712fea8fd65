"""Whose bundles are opened: keys, signatures, and the policy of this machine."""
