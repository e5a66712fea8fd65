"""Recipes that make a checkpoint."""
